"""What is installed: one list of packages in two files, the package data, the entry points, the
Makefile's targets.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import flexinfer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
INSTALLED = ("ggml", "serve", "bench", "dev")  # the extras that make installs
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def ranges(requirements: list[str]) -> dict[str, set[str]]:
    """Package name -> its version conditions."""
    found = {}
    for line in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", line)
        assert match is not None, line
        found[match[1].lower().replace("_", "-")] = {
            one.replace(" ", "") for one in match[2].split(",")
        }
    return found


def test_environment_and_project_name_the_same_packages_and_ranges() -> None:
    listed = next(one["pip"] for one in ENVIRONMENT["dependencies"] if isinstance(one, dict))
    extras = PROJECT["optional-dependencies"]
    wanted = ranges(
        [*PROJECT["dependencies"], *(line for name in INSTALLED for line in extras[name])]
    )
    assert ranges([line for line in listed if not line.startswith("-")]) == wanted
    assert {"--editable .", "--constraint constraints.txt"} <= set(listed)


def test_environment_and_project_ask_for_the_same_python() -> None:
    conda = [
        one
        for one in ENVIRONMENT["dependencies"]
        if isinstance(one, str) and one.startswith("python")
    ]
    assert conda == ["python" + PROJECT["requires-python"]]


def test_a_range_that_differs_would_be_noticed() -> None:
    assert ranges(["Torch==2.13.0"]) == ranges(["torch == 2.13.0"]) != ranges(["torch==2.12.0"])
    assert ranges(["a>=1,<2"]) == ranges(["a<2,>=1"])


def test_every_package_is_pinned_within_its_range() -> None:
    pins = ranges([line for line in CONSTRAINTS.splitlines() if not line.startswith("#")])
    extras = PROJECT["optional-dependencies"]
    for line in (
        *PROJECT["dependencies"],
        *(line for name in (*INSTALLED, "docs") for line in extras[name]),
    ):
        requirement = Requirement(line)
        (pin,) = pins[requirement.name.lower().replace("_", "-")]
        assert pin.startswith("=="), line
        assert requirement.specifier.contains(pin.removeprefix("==")), line
    assert pins["torch"] == {"==2.13.0"}  # its CPU build is small


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert version("flexinfer") == flexinfer.__version__
    assert f"## {flexinfer.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")


def test_the_citation_names_licence_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] in (ROOT / "README.md").read_text()


def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "flexinfer", tree / "flexinfer", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("experiments", "tests", "conf", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "flexinfer = flexinfer.cli.main:main" in wheel.read(entry_points).decode()
    sources = [*(ROOT / "flexinfer").rglob("*.py"), ROOT / "flexinfer" / "py.typed"]
    assert names == {str(file.relative_to(ROOT)) for file in sources}


def test_the_engine_imports_neither_harness_nor_tests() -> None:
    for file in (ROOT / "flexinfer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "experiments",
                "scripts",
                "tests",
            }, file


@pytest.mark.parametrize(
    "command", [["flexinfer"], [sys.executable, "-m", "flexinfer"]], ids=["script", "module"]
)
def test_both_ways_to_start_it_show_the_commands(command: list[str]) -> None:
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    done = subprocess.run(
        [program, *command[1:], "--help"], capture_output=True, text=True, check=True
    )
    for name in ("generate", "chat", "serve", "plan", "ls", "quantize", "doctor"):
        assert name in done.stdout


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
