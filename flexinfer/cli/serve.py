"""flexinfer serve: an OpenAI-compatible server for one model."""

from dataclasses import fields
from typing import Annotated

import typer

from flexinfer.cli.interrupt import held_back
from flexinfer.cli.parameters import Model
from flexinfer.options import Options

INSTALL = "pip install 'flexinfer[serve]'"

Host = Annotated[str, typer.Option(help="where to listen; only this machine reaches the default")]
Port = Annotated[int, typer.Option(help="0 takes a free one")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="that requests have to bring ($FLEXINFER_API_KEY, or none, if left out)"),
]
Queue = Annotated[int, typer.Option(help="requests that may wait")]
Grace = Annotated[float, typer.Option(metavar="SECONDS", help="after SIGTERM, for what runs")]


def serve(
    model: Model,
    options: Options,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    queue: Queue = 16,
    grace: Grace = 10.0,
) -> int:
    """An OpenAI-compatible server for one model; needs flexinfer[serve].

    Answers requests until SIGTERM or Ctrl-C.
    """
    try:
        with held_back():
            from flexinfer.serve import server
    except ImportError as error:
        raise ImportError(f"flexinfer serve needs {error.name}: {INSTALL}") from error
    given = {
        one.name: getattr(options, one.name) for one in fields(options) if one.name != "tokenizer"
    }
    server.serve(model, host=host, port=port, api_key=api_key, queue=queue, grace_s=grace, **given)
    return 0
