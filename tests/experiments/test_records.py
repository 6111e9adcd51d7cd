"""Records: what was written is read back; what disagrees with the schema or with itself is refused
by line and field.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.config import SystemConfig
from experiments.provenance import cpu_name, provenance
from experiments.record_files import append_record, drop_partial_line, load_records
from experiments.records import (
    DERIVED,
    OLDER,
    Limits,
    Record,
    RecordError,
    bound_tokens_per_s,
    check_comparable,
    with_common_costs,
)
from tests.experiments.samples import make_cell, make_record


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def told(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(make_record().model_dump_json())
    return data | changes


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records = [
        make_record(prefill_s={16: [0.5, 0.25], 512: [9.0]}),
        make_record(
            status="killed", message="out of memory", tokens=0, passes=0, token_s=[], token_bytes=[]
        ),
    ]
    for record in records:
        append_record(tmp_path / "a" / "x.jsonl", record)
    assert load_records(tmp_path) == records
    assert len((tmp_path / "a" / "x.jsonl").read_text().splitlines()) == 2


def test_a_record_of_the_old_format_keeps_its_key_and_stands_apart(tmp_path: Path) -> None:
    old = told()
    old["cell"]["model"]["formats"] = ["int4", "gguf"]
    del old["cell"]["workload"]["prefill_tokens"], old["prefill_s"], old["cell_key"]
    ours, theirs = json.loads(json.dumps([old, old]))
    ours["cell"]["system"]["format"], theirs["cell"]["system"]["format"] = "int4", "gguf"
    theirs["run_id"] = "another run"
    read = load_records(write(tmp_path / "x.jsonl", ours, theirs))
    assert {one.weights for one in read} == {"int4 and Q4_0"}
    assert read[0].place == read[1].place != make_record().place
    append_record(tmp_path / "y.jsonl", read[0])
    assert load_records(tmp_path / "y.jsonl")[0].cell_key == read[0].cell_key


def test_speed_bound_and_ratio_are_written_and_follow_from_the_samples(tmp_path: Path) -> None:
    append_record(tmp_path / "x.jsonl", make_record())
    line = json.loads((tmp_path / "x.jsonl").read_text())
    resident_bytes = 2**30 - 400_000_000
    assert line["tokens_per_s"] == pytest.approx(1 / 3)  # the median of 4, 2 and 3 s
    assert line["bound_tokens_per_s"] == pytest.approx(5e8 / (3e9 - resident_bytes))
    assert line["ratio"] == pytest.approx(line["tokens_per_s"] / line["bound_tokens_per_s"])


def test_a_pass_of_several_tokens_counts_for_the_speed_but_not_for_the_ratio() -> None:
    single, triple = make_record(), make_record(tokens=9)
    assert triple.tokens_per_s == pytest.approx(3 * (single.tokens_per_s or 0))
    assert triple.ratio == pytest.approx(single.ratio)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": "many"}, "tokens"),
        ({"speed": 3}, "speed"),
        ({"status": "fine"}, "status"),
        ({"kind": "projected"}, "kind"),
        ({"schema_version": 2}, "schema_version"),
        ({"bits": 0}, "bits"),
        ({"token_s": [1.0]}, "token_s"),
        ({"token_s": [1.0, -1.0, 1.0]}, "token_s"),
        ({"prefill_s": {"16": [-1.0]}}, "prefill_s"),
        ({"prefill_s": {"many": [1.0]}}, "prefill_s"),
        ({"limits": {"method": "docker"}}, "limits.method"),
        ({"provenance": {}}, "provenance.versions"),
        ({"status": "killed"}, "message"),
        ({"tokens": 0}, "tokens"),
        ({"tokens_per_s": 100.0}, "tokens_per_s"),
        ({"ratio": None}, "ratio"),
        ({"cell": {}}, "cell"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", told(), told(**change))
    with pytest.raises(RecordError, match=rf"x\.jsonl:2: field {field}\b"):
        load_records(path)


def test_an_unknown_field_deep_in_the_cell_is_refused_by_name(tmp_path: Path) -> None:
    line = told()
    line["cell"]["model"]["shape"]["experts"] = 8
    with pytest.raises(RecordError, match=r"x\.jsonl:1: field cell.*experts"):
        load_records(write(tmp_path / "x.jsonl", line))


def test_a_wrong_type_deep_in_the_cell_is_refused_by_name(tmp_path: Path) -> None:
    line = told()
    line["cell"]["workload"]["min_tokens"] = "several"
    with pytest.raises(RecordError, match=r"x\.jsonl:1: field cell.*(min_tokens|several)"):
        load_records(write(tmp_path / "x.jsonl", line))


def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", told())
    path.write_text(path.read_text() + "{nonsense}\n")
    with pytest.raises(RecordError, match=r"x\.jsonl:2"):
        load_records(path)


def test_a_line_that_is_not_text_is_refused_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", told())
    path.write_bytes(path.read_bytes() + b'{"a": "\xf2"}\n')
    with pytest.raises(RecordError, match=r"x\.jsonl:2"):
        load_records(path)


@pytest.mark.parametrize(
    "change",
    [
        {"total_weight_bytes": 10**400},
        {"tokens": 10**400},
        {"tokens_per_s": 10**400},
        {"ratio": 10**400},
        {"token_s": [1e-320] * 3},
        {"token_s": [float("nan")] * 3},
        {"bandwidth_bytes_per_s": float("inf")},
        {"engine": {"plan": [float("nan")]}},
        {"cell": told()["cell"] | {"workload": {"max_seconds": float("inf")}}},
        {"provenance": told()["provenance"] | {"memory_bytes": 10**400}},
    ],
)
def test_numbers_without_end_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    line = {name: value for name, value in told().items() if name not in DERIVED}
    with pytest.raises(RecordError, match=r"x\.jsonl:1: field"):
        load_records(write(tmp_path / "x.jsonl", line | change))


def test_a_killed_run_with_passes_and_no_tokens_has_no_ratio() -> None:
    record = make_record(status="killed", message="out of memory", tokens=0)
    assert record.tokens_per_s == 0
    assert record.ratio is None


def test_what_a_line_says_is_fit_for_a_terminal_and_has_an_end(tmp_path: Path) -> None:
    for change in ({"\x1b[2J": 1}, {"status": "\x1b[2J" * 9999}, {"ratio": "x" * 9999}):
        with pytest.raises(RecordError, match=r"x\.jsonl:1: field") as refused:
            load_records(write(tmp_path / "x.jsonl", told(**change)))
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 2000


def test_a_separator_of_lines_that_is_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps(told(message="one\u2028two"), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert load_records(path)[0].message == "one\u2028two"


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    line = told()
    with pytest.raises(RecordError, match="run_id"):
        load_records(write(tmp_path / "x.jsonl", line, line))


def test_a_missing_directory_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"scripts/run\.py"):
        load_records(tmp_path / "nothing")


@given(cut=st.integers(min_value=1, max_value=400))
def test_the_line_a_kill_cut_off_is_reported_then_dropped_and_nothing_else_is(
    cut: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    first = make_record()
    append_record(path, first)
    append_record(path, make_record())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RecordError, match=r"x\.jsonl:2: the last line is cut off"):
        load_records(path)
    assert drop_partial_line(path)
    assert load_records(path) == [first]
    assert not drop_partial_line(path)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        make_record().tokens = 5


def test_records_of_two_machines_do_not_meet_in_one_figure() -> None:
    here, there = make_record(), make_record()
    there = make_record(provenance=there.provenance.model_copy(update={"cpu": "Another CPU"}))
    check_comparable([here, here])
    with pytest.raises(RecordError, match=r"Another CPU.*Test CPU"):
        check_comparable([here, there])


def test_unlimited_records_do_not_stand_beside_limited_ones() -> None:
    unlimited = make_record(limits=Limits(method="unlimited"))
    check_comparable([unlimited, unlimited])
    with pytest.raises(RecordError, match="unlimited"):
        check_comparable([make_record(), unlimited])


def test_records_of_two_engines_do_not_meet() -> None:
    new = make_record()
    old = make_record(
        provenance=new.provenance.model_copy(update={"versions": {"flexinfer": "0.0.1"}})
    )
    check_comparable([old, old])
    with pytest.raises(RecordError, match=r"engines 0\.0\.1, .*older/0\.0\.1/"):
        check_comparable([old, new])


def test_records_of_earlier_engines_are_a_results_directory_of_their_own(tmp_path: Path) -> None:
    new, old = make_record(), make_record()
    append_record(tmp_path / "fig4" / "a.jsonl", new)
    append_record(tmp_path / OLDER / "0.0.1" / "fig4" / "a.jsonl", old)
    assert [one.run_id for one in load_records(tmp_path)] == [new.run_id]
    assert [one.run_id for one in load_records(tmp_path / OLDER / "0.0.1")] == [old.run_id]


@given(
    total=st.integers(1, 10**11),
    resident=st.integers(-(10**10), 2 * 10**11),
    bandwidth=st.floats(1e6, 1e10),
    compute_s=st.floats(1e-3, 1e2),
)
def test_the_bound_lies_between_no_and_full_residency(
    total: int, resident: int, bandwidth: float, compute_s: float
) -> None:
    bound = bound_tokens_per_s(total, resident, bandwidth, compute_s)
    assert bound_tokens_per_s(total, 0, bandwidth, compute_s) <= bound <= 1 / compute_s
    assert bound_tokens_per_s(total, resident + 10**9, bandwidth, compute_s) >= bound


def test_without_its_parts_there_is_no_bound() -> None:
    record = make_record(bandwidth_bytes_per_s=None)
    assert record.bound_tokens_per_s is None
    assert record.ratio is None


def test_an_ok_record_without_tokens_cannot_be_made() -> None:
    with pytest.raises(ValidationError, match="tokens"):
        Record.model_validate(told(tokens=0, passes=0, token_s=[], token_bytes=[]))


def test_provenance_names_this_machine_and_makes_a_valid_record(tmp_path: Path) -> None:
    found = provenance(tmp_path / "not" / "there")
    assert found.versions["python"]
    assert found.file_system
    assert found.about["cpu"].startswith("family")
    assert make_record(make_cell(), provenance=found).provenance.machine == found.machine


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx2 f16c", "Intel Xeon Processor"),
        ("avx2 avx512f amx_tile", "Intel Xeon Processor, AVX-512, AMX"),
    ],
)
def test_the_width_of_the_vectors_belongs_to_the_name_of_the_cpu(
    tmp_path: Path, flags: str, name: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: {flags}\n"
    )
    assert cpu_name(cpuinfo) == name


def test_every_run_on_a_device_is_held_against_the_same_rate() -> None:
    def seen(budget_bytes: int, rate: float, limit: int | None = None) -> Record:
        record = make_record(make_cell(budget_bytes=budget_bytes), bandwidth_bytes_per_s=rate)
        return record.model_copy(
            update={"limits": record.limits.model_copy(update={"read_bytes_per_s": limit})}
        )

    slow, fast, elsewhere = with_common_costs(
        [seen(2**30, 6e8), seen(2**30, 9e8), seen(2**31, 7e8)]
    )
    assert {one.bandwidth_bytes_per_s for one in (slow, fast, elsewhere)} == {9e8}
    assert slow.bound_tokens_per_s == fast.bound_tokens_per_s
    many = with_common_costs([seen(2**30, 1e8 * rate) for rate in range(1, 21)])
    assert {one.bandwidth_bytes_per_s for one in many} == {18e8}  # one run in ten saw more
    assert [
        one.bandwidth_bytes_per_s for one in with_common_costs([seen(2**30, 6e8, 500_000_000)])
    ] == [5e8]


def seen_by(system: str, compute_s: float, budget_bytes: int = 2**30, **changes: Any) -> Record:
    kind = "llama_cpp" if system.startswith("llama") else "flexinfer"
    options = {"use_extra_bufts": False} if system == "llama-cpp-mmap" else {}
    config = SystemConfig(system, system, kind=kind, format="q4_0", options=options)
    told = {"token_bytes": [2**30] * 3, "compute_s_per_pass": compute_s}
    return make_record(make_cell(system=config, budget_bytes=budget_bytes), **told | changes)


def test_the_cost_of_kernels_is_the_least_that_shallow_models_gave() -> None:
    records = [
        seen_by("flexinfer", 0.4),
        seen_by("sync", 0.3),
        seen_by("llama-cpp-mmap", 0.5),
        seen_by("llama-cpp-mmap", 0.2, 2**33),
        seen_by("llama-cpp-default", 0.1),
    ]
    assert [one.compute_s_per_pass for one in with_common_costs(records)] == [
        0.3,
        0.3,
        0.2,
        0.2,
        0.1,
    ]


def test_the_cost_of_kernels_is_that_of_a_run_with_all_in_memory_where_there_is_one() -> None:
    records = [
        seen_by("flexinfer", 0.1),
        seen_by("flexinfer", 0.4, 2**33, token_bytes=[0, 0, 0], token_s=[0.45, 0.42, 0.5]),
        seen_by("llama-cpp-mmap", 0.2),
    ]
    assert [one.compute_s_per_pass for one in with_common_costs(records)] == [0.42, 0.42, 0.2]
    faster = seen_by("sync", 0.3, token_s=[0.41, 0.43, 0.44])  # a streaming pass is a pass as well
    assert with_common_costs([*records, faster])[0].compute_s_per_pass == 0.41
