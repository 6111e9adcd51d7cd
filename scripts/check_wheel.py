"""Builds the wheel, installs it into an empty environment with the core dependencies alone, and
runs it there: make wheel.

A small checkpoint is made here (tests/small_model.py); there it is planned, run and listed, from a
directory that knows nothing of this checkout. A GGUF file and the server have to be refused with
the command that installs what is missing.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import flexinfer

ROOT = Path(__file__).parents[1]
MAKE_MODEL = """
import sys
from pathlib import Path
import torch, transformers
sys.path.insert(0, sys.argv[2])
from small_model import CONFIG, add_tokenizer
torch.manual_seed(0)
shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
plain = Path(sys.argv[1]) / "plain"
config = transformers.LlamaConfig(**shape, **CONFIG)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(plain)
add_tokenizer(plain, Path(sys.argv[1]) / "model")
"""
NOT_CORE = ("gguf", "transcribe-cpp-native", "uvicorn", "matplotlib", "hydra-core", "pytest")


def main() -> int:
    """0 when all of it works; the output of what does not is shown."""
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run([*pip, "wheel", "--no-deps", "--wheel-dir", scratch, str(ROOT)], here)
        wheel = next(here.glob("flexinfer-*.whl"))
        venv.create(here / "empty", with_pip=True)
        python = str(here / "empty" / "bin" / "python")
        constraints = str(ROOT / "constraints.txt")
        run(
            [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel)],
            here,
        )
        with zipfile.ZipFile(wheel) as archive:
            folders = {name.split("/")[0] for name in archive.namelist()}
        assert folders == {"flexinfer", f"{wheel.stem.split('-py3')[0]}.dist-info"}, folders
        run([sys.executable, "-c", MAKE_MODEL, scratch, str(ROOT / "tests")], here)
        installed = run([python, "-m", "pip", "list", "--format", "json"], here)
        extra = {one["name"] for one in json.loads(installed)} & set(NOT_CORE)
        assert not extra, f"not core dependencies: {extra}"
        command = str(here / "empty" / "bin" / "flexinfer")
        assert run([command, "--version"], here).split() == ["flexinfer", flexinfer.__version__]
        asked = [
            command,
            "generate",
            "model",
            "abc",
            "--memory",
            "2GiB",
            "--max-new-tokens",
            "8",
            "--json",
        ]
        assert json.loads(run(asked, here))["tokens"] == 8
        assert json.loads(run([command, "plan", "model", "--json"], here))["roles"]
        assert json.loads(run([command, "ls", ".", "--json"], here))[0]["smallest_bytes"]
        (here / "model.gguf").write_bytes(b"GGUF")
        refused = subprocess.run(
            [command, "generate", "model.gguf", "abc"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 2, refused.stderr
        assert "pip install 'flexinfer[ggml]'" in refused.stderr, refused.stderr
        refused = subprocess.run(
            [command, "serve", "model"], cwd=here, capture_output=True, text=True, check=False
        )
        assert refused.returncode == 2, refused.stderr
        assert "pip install 'flexinfer[serve]'" in refused.stderr, refused.stderr
        print(f"{wheel.name} works in an empty environment")
    return 0


def run(command: list[str], directory: Path) -> str:
    """Standard output of a command that must succeed, without this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "FLEXINFER_CACHE": str(directory / "cache")}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
