"""Examples in README and docs work: Python runs, commands run on a small model, experiments
compose.

`path/to/model` stands for a checkpoint there and is replaced by a small random one here.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from served import serving
from small_model import CONFIG, add_tokenizer

from experiments.config import RunConfig
from experiments.runner import cells_of
from flexinfer.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("usage", "models", "serving", "reproduce")))
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [
    line
    for language, code in BLOCKS
    if language == "sh"
    for line in dict.fromkeys(code.splitlines())
    if line.strip() and not line.startswith("#")
]
RUN = "python scripts/run.py "
# Each once, whatever its comment.
COMMANDS = list({re.split(r"\s+#", one)[0]: None for one in LINES if not one.startswith(RUN)})
SERVED = "http://127.0.0.1:8000/v1"
# Environment and network.
NOT_RUN = ("export ", "pip install ")


@pytest.fixture(scope="module")
def model_dir(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(checkpoint("llama", **CONFIG), tmp_path_factory.mktemp("readme") / "model")


def test_every_block_is_python_or_shell() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert TEXT.count("```") == 2 * len(BLOCKS)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str, model_dir: Path) -> None:
    assert "path/to/model" in code
    with contextlib.ExitStack() as servers:
        if SERVED in code:
            url = servers.enter_context(serving(model_dir, context=512)).url
            code = code.replace(SERVED, url).replace("max_tokens=200", "max_tokens=8")
        exec(code.replace("path/to/model", str(model_dir)), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work(
    command: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command.startswith(NOT_RUN):
        return
    program, *argv = shlex.split(command, comments=True)
    if program == "make":
        subprocess.run(["make", "--dry-run", *argv], cwd=ROOT, check=True, capture_output=True)
    elif (program, argv[0]) == ("flexinfer", "serve"):
        argv = [str(model_dir) if one == "path/to/model" else one for one in argv]
        command = [sys.executable, "-m", "flexinfer", *argv, "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            assert any("http://127.0.0.1" in line for line in server.stderr)
            server.terminate()
            assert server.wait(60) == 143
    elif program == "flexinfer":
        paths = {
            "path/to": str(model_dir.parent),
            "path/to/model": str(model_dir),
            "path/to/copy": str(tmp_path / "copy"),
        }
        argv = [paths.get(one, one) for one in argv]
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
        quick = {"chat": ["--max-new-tokens", "4"], "doctor": [str(tmp_path), "--size", "32MiB"]}
        assert main(argv + quick.get(argv[0], [])) == 0, capsys.readouterr().err
    else:
        assert (program, argv[:2]) == ("python", ["scripts/clean.py", "--list"])
        run_script(*argv, cache=tmp_path)


def test_experiments_compose(model_dir: Path) -> None:
    """All of them in this process; what -m sweeps is composed value by value."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    composed = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for line in (line for line in LINES if line.startswith(RUN)):
            line = line.removeprefix(RUN).replace("path/to/model", str(model_dir))
            argv = shlex.split(line, comments=True)
            sweeps = [swept(one) if "-m" in argv else [one] for one in argv if one != "-m"]
            for overrides in product(*sweeps):
                config = OmegaConf.to_object(compose("config", overrides=list(overrides)))
                assert isinstance(config, RunConfig)
                assert config.include or cells_of(config), line
                composed.append(config.experiment)
    assert {"table1", "fig3", "fig4", "fig5", "claims"} <= set(composed)


def swept(override: str) -> list[str]:
    """The values of `name=a,b`, each as an override; of one in brackets itself."""
    name, _, value = override.partition("=")
    return [override] if "[" in value else [f"{name}={one}" for one in value.split(",")]


def run_script(*argv: str, cache: Path | None = None) -> None:
    environment = os.environ | ({"FLEXINFER_CACHE": str(cache)} if cache else {})
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    """Files and anchors; `make docs` checks the pages of the site once more."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md"]
    texts = {file: file.read_text(encoding="utf-8") for file in (*pages, ROOT / "CHANGELOG.md")}
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts[notebook] = "\n".join(
            "".join(one["source"]) for one in cells if one["cell_type"] == "markdown"
        )
    for file, text in texts.items():
        for path, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text):
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), f"{file.name}: {path}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), (
                    f"{file.name}: {path}#{anchor}"
                )


def anchors(text: str) -> set[str]:
    """The names that code hosts and the site give the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


def test_docs_name_tests_that_exist() -> None:
    for page in ("design", "reliability", "results", "usage"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for name in set(re.findall(r"(?:\w+/)?test_\w+\.py", text)):
            assert (ROOT / "tests" / name.removeprefix("tests/")).exists(), f"{page}: {name}"
