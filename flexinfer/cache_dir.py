"""Where things are kept that are made once: configs and tokenizers of GGUF files, checksums, drafts, measured speeds.

`$FLEXINFER_CACHE`, or `~/.cache/flexinfer`. What is there already is used even where nothing can be written; what is new
goes to a private temporary directory then, which ends with the process.
"""

import atexit
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

VARIABLE = "FLEXINFER_CACHE"


def cache_dir() -> Path:
    """The directory that is named, whether or not it can be written to."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get(VARIABLE) or "~/.cache/flexinfer")))


def user_path(path: str | Path) -> Path:
    """`path` as people write it: ~ is their home directory."""
    return Path(os.path.expanduser(path))


def make_folder(folder: Path, option: str) -> None:
    """Make `folder`, which `option` names, and see that it can be written to. Raises ValueError where not."""
    try:
        _use(folder)
    except OSError as error:
        raise ValueError(
            f"{option}={str(folder)!r}: nothing can be written there ({error.strerror}); name another directory"
        ) from error


def in_cache(*parts: str) -> Path:
    """The place of something that is kept, or is to be kept now: its folder can be written to unless it is there already.

    Falls back to a private temporary directory, with a warning, once.
    """
    folder = cache_dir()
    place = folder.joinpath(*parts)
    try:
        if place.exists():
            return place
        _use(place.parent)
        return place
    except OSError as error:
        place = temporary_cache(error.strerror or str(error)).joinpath(*parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


def temporary_cache(problem: str) -> Path:
    """A directory of this process that stands in for the cache directory, as `problem` is with that; said once."""
    return _temporary(cache_dir(), problem)


def _use(folder: Path) -> None:
    """Make `folder`, and a file in it that goes at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@cache
def _temporary(folder: Path, problem: str) -> Path:
    """The directory of this process that stands in for `folder`."""
    made = Path(tempfile.mkdtemp(prefix="flexinfer-"))
    atexit.register(_remove, made, os.getpid())
    warnings.warn(
        f"{folder}: nothing can be kept there ({problem}); what is made now is kept in {made} until this process ends. Set "
        f"{VARIABLE} to a directory that can be written to",
        RuntimeWarning,
        stacklevel=3,
    )
    return made


def _remove(made: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a child that ends on its own
        shutil.rmtree(made, ignore_errors=True)
