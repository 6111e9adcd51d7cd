"""What the commands show: listings, charts, pictures, errors in red; and a model that is fetched,
by a Hub that is a directory here.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_model import CONFIG, add_tokenizer
from test_bars import run_at_terminal

import flexinfer
import flexinfer.formats.hub
from flexinfer.cli.chat import plan_lines
from flexinfer.cli.ls import in_folder, in_hub_cache
from flexinfer.cli.main import main
from flexinfer.cli.parameters import complete_model
from flexinfer.cli.plan import BAR_COLUMNS, budget_bar
from flexinfer.observe.notebook import TqdmBars, last_pass
from flexinfer.observe.report import budget_parts

ID = "someone/small"


@pytest.fixture(scope="module")
def model_dir(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(
        checkpoint("llama", **CONFIG), tmp_path_factory.mktemp("commands") / "model"
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put_into(hub_cache: Path, model_dir: Path, name: str = ID) -> Path:
    """A snapshot as the Hub's client leaves one."""
    home = hub_cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(model_dir, home / "snapshots" / "abc")
    return home / "snapshots" / "abc"


# ---- ls


def test_ls_finds_models_in_the_hub_cache_and_in_directories(
    hub_cache: Path, model_dir: Path, tmp_path: Path
) -> None:
    snapshot = put_into(hub_cache, model_dir)
    (hub_cache / "models--no--snapshot").mkdir()
    assert list(in_hub_cache()) == [(ID, snapshot)]
    below = shutil.copytree(model_dir, tmp_path / "disk" / "a" / "b")
    for name in ("one.gguf", "two-00001-of-00002.gguf", "two-00002-of-00002.gguf"):
        (tmp_path / "disk" / name).touch()
    found = [path for _, path in in_folder(tmp_path / "disk")]
    assert found == [
        tmp_path / "disk" / "one.gguf",
        tmp_path / "disk" / "two-00001-of-00002.gguf",
        below,
    ]


def test_ls_tells_the_smallest_budget_and_reads_no_weights(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path / "good")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    weights = tmp_path / "good" / "model.safetensors"
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:
        file.seek(header_bytes)
        # No weights are there to be read.
        file.write(b"\0" * (weights.stat().st_size - header_bytes))
    assert main(["ls", str(tmp_path), "--json"]) == 0
    broken, good = json.loads(capsys.readouterr().out)
    assert (broken["path"], good["path"]) == (str(tmp_path / "broken"), str(tmp_path / "good"))
    assert broken["problem"]
    assert broken["smallest_bytes"] is None
    assert good["encoding"] == "F32"
    assert good["weights_bytes"] == weights.stat().st_size - header_bytes
    assert 100 << 20 < good["smallest_bytes"] <= good["budget_bytes"]
    assert main(["ls", str(tmp_path), "--memory", "10MiB"]) == 0
    assert "A smaller context makes the KV cache" in capsys.readouterr().out


def test_ls_says_where_there_is_nothing(
    tmp_path: Path, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls"]) == 0
    assert "no models in the Hub cache" in capsys.readouterr().out
    assert main(["ls", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err


# ---- fetching


def test_chat_fetches_what_is_not_there_says_so_and_answers(
    hub_cache: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def snapshot_download(
        name: str, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        asked.append(local_files_only)
        home = hub_cache / "models--someone--small" / "snapshots" / "abc"
        if local_files_only and not home.is_dir():
            raise FileNotFoundError("not in the cache")
        return str(home if home.is_dir() else put_into(hub_cache, model_dir))

    monkeypatch.setattr(flexinfer.formats.hub, "snapshot_download", snapshot_download)
    for fetched in (True, False):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
        assert main(["chat", ID, "--memory", "auto", "--max-new-tokens", "4"]) == 0
        said = capsys.readouterr().err.splitlines()
        assert any("fetching it from the Hugging Face Hub" in line for line in said) == fetched
        assert said[-1].startswith("4 tokens, first after")
    assert asked == [True, False, True]  # the second time nothing is downloaded


def test_what_cannot_be_had_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(flexinfer.formats.hub, "snapshot_download", snapshot_download)
    assert main(["chat", "nobody/nothing"]) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert len(before) == 1  # that it is fetched
    said = (
        "neither a directory, nor to be had from the Hub (OSError: no network); check the name "
        "and the network"
    )
    assert error == f"error: nobody/nothing: {said}"


def test_a_chat_at_a_terminal_begins_with_the_plan_in_two_lines(model_dir: Path, load: Any) -> None:
    argv = [sys.executable, "-m", "flexinfer", "chat", str(model_dir), "--memory", "2GiB"]
    code, _, screen = run_at_terminal(argv, keys=b"/exit\n")
    assert code == 0
    assert re.search(
        rb"all of them in memory; budget 2.00 GiB\r?\n(about|\x1b).* tokens/s, at most", screen
    )
    model = load(model_dir, policy="none")
    assert "0 B stay in memory" in plan_lines(model_dir, model.flexinfer.plan)[0]


# ---- errors and completion


def test_errors_are_red_on_a_terminal_and_plain_elsewhere() -> None:
    argv = [sys.executable, "-m", "flexinfer", "plan", "/no/such/model"]
    code, _, screen = run_at_terminal(argv)
    assert code == 2
    assert b"\x1b[31merror: /no/such/model" in screen
    done = subprocess.run(argv, capture_output=True, check=False)
    assert done.stderr.startswith(b"error: /no/such/model")
    assert b"\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["genrate"], "No such command 'genrate'"),
        (["chat"], "Missing argument 'MODEL'; see flexinfer chat --help"),
        (["plan", "x", "--memry", "1GiB"], "No such option"),
        (["plan", "x", "--io-threads", "two"], "'--io-threads'"),
    ],
)
def test_a_wrong_line_is_told_in_one(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_without_arguments_the_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "quantize" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexinfer {flexinfer.__version__}\n"


def test_the_shell_completes_options_values_and_models(hub_cache: Path, model_dir: Path) -> None:
    put_into(hub_cache, model_dir)
    assert complete_model("som") == [ID]
    assert complete_model("x") == []
    for words, expected in (("plan x --pol", "--policy"), ("plan x --policy un", "unbalanced")):
        environment = os.environ | {
            "_FLEXINFER_COMPLETE": "complete_bash",
            "COMP_WORDS": f"flexinfer {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        done = subprocess.run(
            [sys.executable, "-m", "flexinfer"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout.split()


# ---- plan


def test_plan_at_a_terminal_draws_bars(model_dir: Path) -> None:
    argv = [sys.executable, "-m", "flexinfer", "plan", str(model_dir)]
    code, shown, _ = run_at_terminal(argv, stdout_too=True)
    assert code == 0
    assert "■ ".encode() in shown
    assert ("█" * BAR_COLUMNS).encode() in shown


def test_the_bar_of_a_budget_is_as_long_as_its_parts_are_large() -> None:
    bar = budget_bar({"process": 1, "window": 2, "locked weights": 1}, 40)
    assert bar.plain == "█" * 40
    assert [span.end - span.start for span in bar.spans] == [10, 20, 10]


# ---- in a notebook


def test_a_loaded_model_shows_itself_and_its_last_pass(model_dir: Path, load: Any) -> None:
    model = load(model_dir, policy="none", trace=True)
    engine = model.flexinfer
    before = engine._repr_html_()
    with pytest.raises(ValueError, match="trace=True"):
        engine.timeline()
    tokenizer: Any = engine.tokenizer
    model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=3)
    html = engine._repr_html_()
    assert "passes so far" in html
    assert "passes so far" not in before
    for part, nbytes in budget_parts(engine.plan).items():
        assert (f"{part}</td>" in html) == bool(nbytes)
    (axes,) = engine.timeline().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "disk reads",
        "compute waits",
        "kernels",
    ]
    computed = [event for event in last_pass(engine.events()) if event["kind"] == "compute"]
    assert len({event["tensor"] for event in computed}) == 4 * 7 + 1


def test_progress_true_draws_a_bar_for_each_stage(
    model_dir: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []

    class Bar:
        def __init__(self, desc: str, total: int, **_: Any) -> None:
            self.desc, self.total, self.n = desc, total, 0

        def update(self, nbytes: int) -> None:
            self.n += nbytes

        def close(self) -> None:
            assert self.n == self.total
            drawn.append((self.desc, self.total))

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    model = load(model_dir, progress=True)
    tokenizer: Any = model.flexinfer.tokenizer
    model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=2)
    stages = [desc for desc, _ in drawn]
    assert stages == ["reading what stays", "reading the prompt", "reading the prompt"]
    TqdmBars()("verify", 0, 10)  # a stage of its own
