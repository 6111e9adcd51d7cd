"""The command line: flexinfer generate | chat | serve | plan | ls | quantize | doctor.

Text goes to stdout, everything about it (progress, speed, notes) to stderr, so that output can be
piped; `--json` prints one object instead. What the user got wrong is one line on stderr and exit
code 2. torch and transformers are imported by the command that needs them, so that `--help` is
quick. It adds nothing to the engine: every command is a few calls that a program could make as
well.
"""

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from flexinfer import __version__
from flexinfer.cli.chat import chat
from flexinfer.cli.doctor import doctor
from flexinfer.cli.generate import generate
from flexinfer.cli.interrupt import INTERRUPTED, Terminated, exit_code, held_back, terminable
from flexinfer.cli.ls import ls
from flexinfer.cli.parameters import parsed
from flexinfer.cli.plan import plan
from flexinfer.cli.quantize import quantize
from flexinfer.cli.serve import serve
from flexinfer.cli.terminal import error, note, note_warning
from flexinfer.imports import defer

# Turns a thread of libgomp spins before it sleeps. Its default is milliseconds: cores burnt while
# the disk is awaited (0.9 of a CPU at 1 GB/s, now 0.15), and ten times the time for a token on a
# busy machine, where spinning threads keep the one they wait for off the core. With as few turns a
# quiet machine is no slower (docs/log.md). Read once, when torch loads libgomp.
SPIN_COUNT = "6000"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can fix, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    given = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    command = typer.main.get_command(commands())
    try:
        with terminable(), warnings.catch_warnings():
            warnings.showwarning = note_warning
            run: Any = command.main(
                given or ["--help"], prog_name="flexinfer", standalone_mode=False
            )
            # Ctrl-C while the arguments were parsed.
            if run == INTERRUPTED:
                raise KeyboardInterrupt
            # A help text was shown.
            if not callable(run):
                return run or 0
            with held_back():
                defer()
            code: int = run()
            return code
    except (KeyboardInterrupt, Terminated) as stop:
        note("stopped")
        return exit_code(stop)
    except BrokenPipeError:
        # The reader of a pipe has gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.TyperException as wrong:
        where = getattr(getattr(wrong, "ctx", None), "command_path", "flexinfer")
        error(f"{wrong.format_message().rstrip('.?')}; see {where} --help")
        return 2
    except (ValueError, OSError, ImportError) as wrong:
        error(str(wrong))
        return 2


def commands() -> typer.Typer:
    """The commands and their options."""
    app = typer.Typer(
        help=(
            "Runs language models that do not fit in memory, inside a memory budget, with the "
            "output unchanged."
        ),
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_top)
    app.command()(parsed(generate))
    app.command()(parsed(chat))
    app.command()(parsed(serve, left_out=("follow", "trace")))
    app.command()(parsed(plan, left_out=("follow", "trace", "verify")))
    app.command()(parsed(ls))
    app.command()(parsed(quantize))
    app.command()(parsed(doctor))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flexinfer {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
) -> None: ...
