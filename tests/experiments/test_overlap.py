"""A pass beside reads: what is attainable follows from known rates, and it is measured for real."""

import subprocess
from pathlib import Path

import pytest

from experiments.config import DeviceConfig
from experiments.gguf import write_synthetic
from experiments.model_config import ShapeConfig
from experiments.overlap import attainable_s, measure, medians, table
from tests.experiments.samples import make_cell, make_record

FREE = [(0.0, 2.0), (1.0, 2.0), (4.0, 2.0)]  # reading costs computing nothing
DEAR = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]  # a second more for each byte/s


@pytest.mark.parametrize(
    ("missed_bytes", "passes", "bandwidth", "expected_s"),
    [
        (0, FREE, 4, 2.0),
        (4, FREE, 4, 2.0),  # read at 2 of 4 bytes/s meanwhile
        (16, FREE, 4, 4.0),  # the bound: 16 bytes at 4 bytes/s
        (0, DEAR, 2, 2.0),
        (3, DEAR, 2, 3.0),  # at 1 byte/s a pass takes 3 s, and reads 3 bytes
        (8, DEAR, 2, 4.0),
        (20, DEAR, 2, 10.0),  # 8 bytes in the 4 s that it computes, 12 in 6 s afterwards
        (20, DEAR, 20, 3.0),  # computed alone, then read: waiting costs less than sharing
        (3, [*DEAR, (0.5, 1.0)], 2, 2.25),  # 1 s is possible beside 0.5 byte/s: 2 was noise
        (0, [*DEAR, (0.5, 1.0)], 2, 1.0),  # nothing to read
        (5, [(0.0, 2.0)], 2, 4.5),
    ],
)
def test_seconds_of_a_pass_at_best(
    missed_bytes: float, passes: list[tuple[float, float]], bandwidth: float, expected_s: float
) -> None:
    assert attainable_s(missed_bytes, passes, bandwidth) == pytest.approx(expected_s)


def test_cells_are_held_against_what_their_machine_gave() -> None:
    cell = make_cell(device=DeviceConfig("native", "ours"))
    told = {"token_s": [4.0], "token_bytes": [100_000_000], "tokens": 1, "passes": 1}
    one = make_record(cell, total_weight_bytes=10**9, bandwidth_bytes_per_s=100e6, **told)
    passes = [(0.0, 1.0), (50e6, 2.0), (100e6, 3.0)]
    line = {
        "provenance": {"cpu": one.provenance.cpu},
        "model": "tiny-q4_0-12345678",
        "passes": [
            {"wanted_bytes_per_s": rate, "read_bytes_per_s": rate, "pass_s": pass_s}
            for rate, pass_s in passes
        ],
    }
    (row,) = table([one], [line]).to_dict("records")
    assert row["attainable s"] == pytest.approx(2.0)
    assert row["of attainable"] == pytest.approx(0.5)
    other = line | {"model": "another-q4_0-12345678"}
    limited = make_record(make_cell(), total_weight_bytes=10**9, **told)
    one_core = make_record(
        make_cell(device=DeviceConfig("native-1-core", "ours", cores=1)),
        total_weight_bytes=10**9,
        **told,
    )
    assert table([one], [other]).empty
    assert table([limited, one_core], [line]).empty


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ShapeConfig(hidden=256, intermediate=1024, layers=4, heads=4, kv_heads=2, vocab=8192)
    return write_synthetic(tmp_path_factory.mktemp("model") / "model.gguf", shape, "tiny", "q4_0")


def children() -> set[str]:
    told = subprocess.run(
        ["pgrep", "-f", "files, rate, size"], capture_output=True, text=True, check=False
    )
    return set(told.stdout.split())


def test_a_record_has_passes_alone_and_beside_reads(model: Path) -> None:
    before = children()
    record = measure(model, "2GiB", [20e6, 40e6], rounds=2, passes=3)
    assert [one["wanted_bytes_per_s"] for one in record["passes"]] == [0, 20e6, 40e6] * 2
    alone, slow, fast = medians(record)
    assert alone[0] == 0 < min(slow[0], fast[0])
    assert all(seconds > 0 for _, seconds in (alone, slow, fast))
    assert children() == before, "the process that reads has ended"


def test_a_model_that_is_streamed_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.overlap.STREAMS_BYTES", -1)
    with pytest.raises(ValueError, match="give it memory"):
        measure(model, "2GiB", [], rounds=1, passes=1)
