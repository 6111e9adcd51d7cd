"""Files of records: one JSON line for each measured cell, appended safely and checked when read.

A line is appended by a single write and fsync, so a kill leaves at most one partial line at the
end.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.records import OLDER, Record, RecordError
from flexinfer.messages import one_line, shown

# Folders with lines of other kinds (experiments.reliability, .agreement)
RELIABILITY, QUALITY = ("reliability", "quality")


def append_record(path: Path, record: Record) -> None:
    """Appends `record` as one line: a single write to a file opened for appending, then fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (
        json.dumps(json.loads(record.model_dump_json()), separators=(",", ":"), allow_nan=False)
        + "\n"
    )
    Record.model_validate_json(line)
    data = line.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(f"{path}: {written} of {len(data)} bytes were written; is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_partial_line(path: Path) -> bool:
    """Cuts off the partial last line that a killed run leaves; True when there was one."""
    if not path.exists():
        return False
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return False
    os.truncate(path, data.rfind(b"\n") + 1)
    return True


def read_file(path: Path) -> list[Record]:
    """The records of one file; the first bad line is refused with its number and field."""
    records = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                raise RecordError(
                    f"{path}:{number}: the last line is cut off: a run was killed here; run it "
                    "again to resume, which drops the line"
                )
            try:
                records.append(Record.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                name = (
                    ".".join(str(part) for part in first["loc"])
                    or first["msg"].removeprefix("Value error, ").split(":")[0]
                )
                raise RecordError(
                    f"{path}:{number}: field {one_line(name)}: {one_line(first['msg'])}"
                ) from error
    return records


def load_lines(file: Path, command: str) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, oldest first.

    Where there is none it says that `command` makes them.
    """
    if not file.exists():
        say_none(file, command)
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def say_none(place: Path, command: str) -> None:
    """Say that `place` has no records of a kind, and which command makes them."""
    print(f"No records for this in {os.path.relpath(place)}. Make them with:  {command}")


def load_records(path: Path | str) -> list[Record]:
    """The records of a .jsonl file, or of every one below a directory but RELIABILITY, QUALITY and
    OLDER; run ids seen twice are refused.
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(
            f"{path}: no such file or directory; python scripts/run.py +exp=smoke makes the first "
            "records"
        )
    records: list[Record] = []
    seen: dict[str, Path] = {}
    others = {RELIABILITY, QUALITY, OLDER}
    below = (
        file
        for file in sorted(path.rglob("*.jsonl"))
        if not others & set(file.relative_to(path).parent.parts)
    )
    for file in below if path.is_dir() else [path]:
        for record in read_file(file):
            if record.run_id in seen:
                raise RecordError(
                    f"{file}: field run_id: {shown(record.run_id)} is in {seen[record.run_id]} "
                    "already"
                )
            seen[record.run_id] = file
            records.append(record)
    return records
