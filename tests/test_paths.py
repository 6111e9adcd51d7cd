"""Paths as people write them, and a cache directory that cannot be written to."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import write_model

import flexinfer.cache_dir
from flexinfer import CheckpointError
from flexinfer.cache_dir import cache_dir, in_cache
from flexinfer.cli.main import main
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.hub import resolve
from flexinfer.formats.safetensors import SINGLE_FILE
from flexinfer.serve.server import name_of
from tests.conftest import Load, MakeCheckpoint, logits, prompt, stock

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a space and an umlaut, which is also where the program is."""
    path = tmp_path / "wo ich bin, übrigens"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.chdir(path)
    return path


def index_file(path: Path) -> Path:
    return next(path.glob("*.index.json"))


WAYS: dict[str, Callable[[Path], str | Path]] = {
    "home": lambda path: f"~/{path.name}",
    "home, as a Path": lambda path: Path(f"~/{path.name}"),
    "relative": lambda path: path.name,
    "relative with a dot": lambda path: f"./{path.name}/",
    "slashes at the end": lambda path: f"{path}//",
    "absolute": lambda path: path,
    "file URL": lambda path: path.as_uri(),
    "config.json": lambda path: path / "config.json",
    "index": index_file,
    "a shard": lambda path: next(path.glob("model-00002*")),
    "a shard from home": lambda path: f"~/{path.name}/{next(path.glob('model-00001*')).name}",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_found_however_it_is_written(
    checkpoint: MakeCheckpoint, load: Load, home: Path, way: str
) -> None:
    path = Path(shutil.copytree(checkpoint(sharded=True), home / "my model"))
    given = WAYS[way](path)
    found = resolve(given)
    assert found.is_dir()
    assert found.samefile(path)
    assert open_checkpoint(given).tensors.keys() == open_checkpoint(path).tensors.keys()
    assert name_of(given) == "my model"


def test_a_file_of_weights_stands_for_its_checkpoint(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    path = checkpoint()
    model = load(path / SINGLE_FILE)
    assert torch.equal(logits(model, prompt()), logits(stock(path), prompt()))
    link = tmp_path / "link.safetensors"
    link.symlink_to(path / SINGLE_FILE)
    assert resolve(link).samefile(path)
    snapshot = tmp_path / "snapshots" / "abc"  # as the Hub cache has it
    snapshot.mkdir(parents=True)
    for number, file in enumerate(path.iterdir()):
        blob = tmp_path / f"blob{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert resolve(snapshot / SINGLE_FILE) == snapshot


def test_what_is_there_and_is_no_checkpoint_is_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    for name in ("adapter.safetensors", "pytorch_model.bin", "notes.txt", "empty"):
        (path / name).write_bytes(b"")
    (tmp_path / "alone.safetensors").write_bytes(b"")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for file, said in {
        path / "adapter.safetensors": "not part of the checkpoint in",
        path / "pytorch_model.bin": "PyTorch's format",
        path / "notes.txt": "neither a GGUF file nor safetensors",
        path / "empty": "neither a GGUF file nor safetensors",
        tmp_path / "alone.safetensors": "there is no config.json beside it",
        tmp_path / "gone": "a link to .*nowhere, which is not there",
        tmp_path / "pipe": "neither a file nor a directory",
    }.items():
        for find in (resolve, open_checkpoint):
            with pytest.raises(CheckpointError, match=said) as refused:
                find(file)
            assert "no such" not in str(refused.value)
    with pytest.raises(CheckpointError, match="is empty"):
        resolve("")
    assert main(["plan", str(path / "notes.txt")]) == 2
    assert "neither a GGUF file nor safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["model.gguf", "MODEL.GGUF", "Model.Gguf", "sha256-6a0746a1ec1a", "model.bin"]
)
def test_gguf_is_known_by_its_first_bytes(home: Path, name: str) -> None:
    written = write_model(home, "llama")
    blobs = home / "blobs"
    blobs.mkdir()
    file = blobs / name
    written.file.rename(file)
    (home / "link").symlink_to(file)
    for given in (file, f"~/blobs/{name}", home / "link", file.as_uri()):
        assert resolve(given).samefile(file)
        assert open_checkpoint(given).in_gguf
    if name != "model.bin":
        assert open_checkpoint(blobs).path == file  # the only one there
    assert resolve(blobs, name) == file
    with pytest.raises(CheckpointError, match="leave gguf_file='x' out"):
        resolve(file, "x")


def test_parts_in_capitals_are_found(tmp_path: Path) -> None:
    written = write_model(tmp_path, "llama", split_tensors=8)
    for file in list(tmp_path.glob("*.gguf")):
        file.rename(file.with_name(file.name.replace(".gguf", ".GGUF")))
    parts = sorted(tmp_path.glob("*.GGUF"))
    assert len(parts) > 1
    for given in (tmp_path, *parts):
        assert open_checkpoint(given).files == parts
    assert written.file.suffix == ".gguf"


def test_unfinished_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.partial").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


def test_commands_take_home_directories(
    checkpoint: MakeCheckpoint, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint(intermediate_size=192), home / "model")
    assert main(["quantize", "~/model", "~/copy", "--type", "q8_0"]) == 0
    assert (home / "copy" / "model.gguf").is_file()
    assert main(["ls", "~"]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["ls", "~/model/config.json"]) == 2
    assert "not a directory" in capsys.readouterr().err
    assert not (home / "~").exists()


def test_options_take_home_directories(checkpoint: MakeCheckpoint, load: Load, home: Path) -> None:
    path = checkpoint(intermediate_size=192)
    model = load(
        path, verify="~/sums", trace="~/trace.json", draft="substitute", draft_dir="~/drafts"
    )
    model.generate(prompt(), max_new_tokens=2)
    model.flexinfer.close()
    assert list((home / "sums").iterdir())
    assert (home / "trace.json").is_file()
    assert list((home / "drafts").iterdir())


def test_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in {
        str(tmp_path / "here"): tmp_path / "here",
        "~/there": Path.home() / "there",
        "": Path.home() / ".cache" / "flexinfer",
        "relative": Path.cwd() / "relative",
    }.items():
        monkeypatch.setenv("FLEXINFER_CACHE", value)
        assert cache_dir() == expected  # as it was before the session's own took its place


@pytest.mark.parametrize("what", ["a file", "a directory below a file", "below /proc"])
def test_where_nothing_can_be_written_a_temporary_directory_is_used_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "file").write_text("")
    folder = {
        "a file": tmp_path / "file",
        "a directory below a file": tmp_path / "file" / "cache",
        "below /proc": Path("/proc/self/nothing") / tmp_path.name,
    }[what]
    monkeypatch.setattr(flexinfer.cache_dir, "cache_dir", lambda: folder)
    with pytest.warns(RuntimeWarning, match=r"nothing can be kept there.*Set FLEXINFER_CACHE"):
        place = in_cache("drafts", "one")
    assert place.parents[1].stat().st_mode & 0o077 == 0
    place.write_text("kept")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_cache("drafts", "one").read_text() == "kept"
        in_cache("checksums", "two").write_text("x")


def test_what_is_there_is_used_though_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drafts").mkdir()
    (tmp_path / "drafts" / "one").write_text("old")

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(flexinfer.cache_dir, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(flexinfer.cache_dir.tempfile, "TemporaryFile", read_only)
    assert in_cache("drafts", "one").read_text() == "old"
    with pytest.warns(RuntimeWarning, match="Read-only"):
        assert not in_cache("drafts", "two").is_relative_to(tmp_path)


PROGRAM = """
import sys, warnings, flexinfer
model = flexinfer.from_pretrained(sys.argv[1], "2GiB", context=32, verify=len(sys.argv) < 3)
ids = __import__("torch").tensor([[5, 6, 7]])
print(model.generate(ids, max_new_tokens=2).shape[1])
"""


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_process_whose_home_cannot_be_written_to_runs_and_leaves_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path, kind: str
) -> None:
    path = checkpoint() if kind == "safetensors" else write_model(tmp_path, "llama").file
    (tmp_path / "temporary").mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLEXINFER", "HF_", "XDG"))
    }
    environment |= {
        "HOME": "/dev/null",
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"
    assert done.stderr.count("Set FLEXINFER_CACHE") == 1
    assert not list((tmp_path / "temporary").glob("flexinfer-*"))


def test_folders_that_are_named_and_cannot_be_written_to_are_refused(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = checkpoint(intermediate_size=192)
    with pytest.raises(
        ValueError, match=r"verify='.*file': nothing can be written there.*another directory"
    ):
        load(path, verify=tmp_path / "file")
    with pytest.raises(ValueError, match=r"draft_dir='.*file/x': nothing can be written there"):
        load(path, draft="substitute", draft_dir=tmp_path / "file" / "x")


@pytest.mark.parametrize("ours", [True, False])
def test_bars_in_a_notebook_without_ipywidgets_are_text_and_nothing_warns(
    tmp_path: Path, ours: bool
) -> None:
    """As in a kernel, by whose modules tqdm knows it, and looks for ipywidgets then.

    Alone it warns.
    """
    (tmp_path / "ipywidgets.py").write_text("raise ImportError")
    program = (
        "import sys, types; sys.modules['IPython'] = ipython = types.ModuleType('IPython'); "
        "ipython.get_ipython = types.SimpleNamespace; sys.modules['ipykernel.zmqshell'] = "
        "types.ModuleType('ipykernel.zmqshell'); "
        f"{'import flexinfer.engine.load; ' if ours else ''}import tqdm.auto, tqdm.std; "
        "print([one.__module__ for one in tqdm.auto.tqdm.__mro__])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tqdm.std" in done.stdout
    assert "tqdm.notebook" not in done.stdout
    assert ("IProgress not found" in done.stderr) == (not ours)
