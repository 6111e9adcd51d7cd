"""Draws docs/serve.svg: a conversation with SmolLM2-135M by openai's client, as it is now, with the
lines that the server logs.

python scripts/picture.py --memory 500MiB
"""

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.text import Text

from experiments.smollm2 import make_smollm2

QUESTIONS = ("What is the capital of France?", "And of Italy?")


def main() -> None:
    """Asks the questions one after another, in one conversation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="500MiB")
    parser.add_argument("--to", type=Path, default=Path("docs/serve.svg"))
    arguments = parser.parse_args()
    console = Console(record=True, width=110, force_terminal=True)
    path = make_smollm2()
    command = ["flexinfer", "serve", path.name, "--memory", arguments.memory]
    console.print(f"[green]$[/] {' '.join(command)}", highlight=False)
    command = [
        sys.executable,
        "-m",
        "flexinfer",
        "serve",
        str(path),
        "--memory",
        arguments.memory,
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = ""
        while not url:
            line = server.stderr.readline()
            if not line:
                raise SystemExit("the server did not start")
            console.print(line.rstrip(), style="dim", highlight=False, markup=False)
            found = re.search(r"http://\S+/v1", line)
            url = found[0] if found else ""
        said: list[Any] = []
        client = OpenAI(base_url=url, api_key="none")
        for question in QUESTIONS:
            said.append({"role": "user", "content": question})
            answer = client.chat.completions.create(
                model=path.name, messages=said, max_tokens=48, temperature=0
            )
            text = answer.choices[0].message.content or ""
            said.append({"role": "assistant", "content": text})
            console.print(f"[bold blue]user:[/] {question}", highlight=False)
            console.print(Text.assemble(("assistant:", "bold magenta"), " ", text))
            console.print(
                server.stderr.readline().rstrip(), style="dim", highlight=False, markup=False
            )
        server.send_signal(signal.SIGTERM)
        console.print(server.stderr.readline().rstrip(), style="dim", highlight=False)
    arguments.to.write_text(
        console.export_svg(title="flexinfer serve, and openai's client"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
