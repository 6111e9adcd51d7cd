"""Where things are kept that are made once: configs and tokenizers of GGUF files, checksums
and drafts.

`$FLEXINFER_CACHE`, or `~/.cache/flexinfer`. What is there already is used even where nothing can be
written; what is new goes to a private temporary directory then, which ends with the process. A
directory that is made here is written under another name and renamed when it is complete, so that
nobody sees half of one, whoever else makes the same one meanwhile.
"""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

VARIABLE = "FLEXINFER_CACHE"


def cache_dir() -> Path:
    """The directory that is named, whether or not it can be written to."""
    return Path(
        os.path.abspath(os.path.expanduser(os.environ.get(VARIABLE) or "~/.cache/flexinfer"))
    )


def user_path(path: str | Path) -> Path:
    """`path` as people write it: ~ is their home directory."""
    return Path(os.path.expanduser(path))


def make_folder(folder: Path, option: str) -> None:
    """Make `folder`, which `option` names, and see that it can be written to.

    Raises ValueError where not.
    """
    try:
        _use(folder)
    except OSError as error:
        raise ValueError(
            f"{option}={str(folder)!r}: nothing can be written there ({error.strerror}); name "
            "another directory"
        ) from error


def in_cache(*parts: str) -> Path:
    """The place of something that is kept, or is to be kept now: its folder can be written to
    unless it is there already.

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
    """A directory of this process that stands in for the cache directory, as `problem` is with
    that; said once.
    """
    return _temporary(cache_dir(), problem)


def make_once(name: str, complete: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache directory, filled by `make` now unless it is `complete`."""
    kept = in_cache(name)
    if complete(kept):
        return kept
    try:
        return _make_whole(kept, complete, make)
    except OSError as error:
        if error.errno is None:
            raise
        place = temporary_cache(error.strerror or str(error)) / name
        return place if complete(place) else _make_whole(place, complete, make)


def _make_whole(kept: Path, complete: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{kept.name}.", dir=kept.parent))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        # Damaged since it was made.
        if kept.exists() and not complete(kept):
            shutil.rmtree(kept)
        try:
            unfinished.rename(kept)
        except OSError:
            # Another process may have made it meanwhile.
            if not complete(kept):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return kept


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
        f"{folder}: nothing can be kept there ({problem}); what is made now is kept in {made} "
        f"until this process ends. Set {VARIABLE} to a directory that can be written to",
        RuntimeWarning,
        stacklevel=3,
    )
    return made


def _remove(made: Path, pid: int) -> None:
    # Not in a child that ends on its own.
    if os.getpid() == pid:
        shutil.rmtree(made, ignore_errors=True)
