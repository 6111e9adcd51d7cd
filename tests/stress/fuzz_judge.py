"""Reads one input with a target and says what is wrong with the way that went.

Anything but the documented error that names the file is a finding, and so are files opened outside
the checkpoint, sockets, processes, prompts, memory or seconds out of proportion to the input,
descriptors and threads left.
"""

import gc
import hashlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

from tests.stress import fuzz_targets
from tests.stress.fuzz_targets import KEPT, ROOT, Target

MAX_MEMORY_BYTES = 64 << 20  # that reading one input may take beside what was there
MAX_CPU_S = 5.0  # of one input; a second look at it has to agree
HANG_CPU_S = 20.0  # then it is stopped
MAX_MESSAGE_CHARACTERS = 4000


class Watch:
    """Sees what the process does while a reader runs. One for a process: audit hooks stay."""

    FORBIDDEN = (
        "socket.",
        "subprocess.",
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "builtins.input",
    )

    # Transformers asks for a compiler for a kernel of its own (RWKV)
    ALLOWED = ("ninja", "--version")

    def __init__(self) -> None:
        paths = sysconfig.get_paths()
        folders = [
            os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")
        ]
        folders = [
            f"{one}/" for one in (*folders, ROOT / "flexinfer", ROOT / "experiments", "/proc")
        ]
        self._libraries = (*folders, "/dev/null", "/dev/urandom")
        self._folder = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def start(self, folder: Path) -> None:
        self.seen = []
        self._folder = os.path.realpath(folder)

    def stop(self) -> None:
        self._folder = ""

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._folder or (event != "open" and not event.startswith(self.FORBIDDEN)):
            return
        if event == "subprocess.Popen" and tuple(arguments[1]) == self.ALLOWED:
            return
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike):
                return
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            folder, self._folder = self._folder, ""
            try:
                real = os.path.realpath(os.fsdecode(path))
            except (ValueError, OSError):
                return
            finally:
                self._folder = folder
            inside = (real + "/").startswith(folder + "/")
            kept = real.startswith(f"{folder}/{KEPT}/")
            library = real.startswith(self._libraries) and (not writes or "__pycache__" in real)
            if (inside and not writes) or kept or library:
                return
            event = f"open {real} {mode}"
        self.seen.append(event if event.startswith("open ") else f"{event} {arguments!r:.200}")
        raise PermissionError(f"forbidden while fuzzing: {event}")


@cache
def watch() -> Watch:
    """The one Watch of this process."""
    return Watch()


@dataclass(slots=True)
class Finding:
    """What is wrong with how an input was read."""

    kind: str  # and place; findings of one kind count once
    message: str = ""
    trace: str = ""

    @property
    def key(self) -> str:
        """A file name for its kind."""
        return hashlib.sha256(self.kind.encode(errors="backslashreplace")).hexdigest()[:12]

    @property
    def text(self) -> str:
        """Kind and message in one line, then the trace."""
        return f"{self.kind}: {self.message[:300]!r}\n\n{self.trace[-20_000:]}"


class Hang(BaseException):
    """An input that takes more than HANG_CPU_S."""


def _stop(*_: object) -> None:
    raise Hang("stopped")


def judge(target: Target, data: bytes, folder: Path) -> Finding | None:
    """Read an input and say what is wrong with the way that went, if anything.

    Dear things get a second look.
    """
    found, dear = _judge_once(target, data, folder)
    if found is None and dear:  # the first use of a module imports it
        found, dear = _judge_once(target, data, folder)
    if found is None and dear:
        found = Finding(dear.partition(":")[0], dear)
    return found


def _judge_once(target: Target, data: bytes, folder: Path) -> tuple[Finding | None, str]:
    from flexinfer.memory.process import peak_bytes, reset_peak

    path = target.place(data, folder)
    errors = target.errors()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    reset_peak()
    before_bytes, start_s = peak_bytes(), process_time()
    raised: BaseException | None = None
    handler = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, HANG_CPU_S)
    watch().start(folder)
    try:
        target.read(path)
    except (Exception, Hang) as error:
        raised = error
    finally:
        watch().stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    cpu_s, more_bytes = process_time() - start_s, peak_bytes() - before_bytes
    found = None
    if isinstance(raised, errors):
        found = _of_refusal(raised, path)
    elif raised is not None:
        found = _of_error(raised)
    raised = None  # it holds the frames, and what is open in them
    if watch().seen:
        found = Finding("reached outside", watch().seen[0])
    if len(os.listdir("/proc/self/fd")) > descriptors or threading.active_count() > threads:
        gc.collect()
        if found is None and len(os.listdir("/proc/self/fd")) > descriptors:
            found = Finding("descriptors are left open")
        if found is None and threading.active_count() > threads:
            found = Finding("threads are left running")
    if cpu_s > MAX_CPU_S:
        return found, f"slow: {cpu_s:.0f} s"
    if more_bytes > MAX_MEMORY_BYTES:
        return found, f"memory: {more_bytes >> 20} MiB"
    return found, ""


def _of_error(error: BaseException) -> Finding:
    own = (__file__, fuzz_targets.__file__)
    at = [one for one in traceback.extract_tb(error.__traceback__) if one.filename not in own]
    where = f" in {Path(at[-1].filename).name}:{at[-1].name}" if at else ""
    return Finding(
        f"{type(error).__name__}{where}", str(error), "".join(traceback.format_exception(error))
    )


def _of_refusal(error: Exception, path: Path) -> Finding | None:
    """A refusal has to name the file and be fit for a terminal, and its cause not be a lack of
    memory.
    """
    message, kind = str(error), ""
    if str(path) not in message:
        kind = "the file is not named"
    elif not message.replace("\n", "").isprintable():
        kind = "a message with control characters"
    elif len(message) > MAX_MESSAGE_CHARACTERS:
        kind = "a message without end"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            kind = "memory is asked for before sizes are checked"
        cause = cause.__cause__
    if not kind:
        return None
    return Finding(kind, message.replace(str(path), ""), "".join(traceback.format_exception(error)))
