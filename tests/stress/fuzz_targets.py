"""The readers that are fuzzed, each with its seeds and the errors it documents.

Modules are imported inside, so that atheris can instrument them.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.stress.fuzz_keys import config_keys, gguf_keys
from tests.stress.fuzz_seeds import (
    SMALL_GGUFS,
    SMALL_MODELS,
    SMALL_RECORD,
    small_checkpoint,
    small_gguf,
)
from tests.stress.gguf_changes import change_gguf
from tests.stress.json_changes import Keys, change_framed, change_lines, framed

ROOT = Path(__file__).parents[2]
PARTS = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
KEPT = "kept"  # the folder in which a reader may write


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of files from strangers."""

    # Makes what lies beside the input in this folder; returns inputs that are right.
    seeds: Callable[[Path], list[bytes]]
    # Writes an input where the reader looks; returns the file or folder.
    place: Callable[[bytes, Path], Path]
    read: Callable[[Path], object]
    errors: Callable[[], tuple[type[Exception], ...]]  # that `read` documents
    modules: tuple[str, ...]  # whose coverage guides
    keys: Callable[[], Keys]
    # By a seed; None where it is not parsed.
    change: Callable[[bytes, int, Keys], bytes | None] = change_lines


def _checkpoint_errors() -> tuple[type[Exception], ...]:
    from flexinfer.formats.tensors import CheckpointError

    return (CheckpointError,)


def _header_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for family in ("llama", "gpt2"):
        content = (small_checkpoint(family, folder / family) / "model.safetensors").read_bytes()
        (header_bytes,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + header_bytes])
        few = dict(sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0])[:5])
        stop = max(entry["data_offsets"][1] for entry in few.values() if "data_offsets" in entry)
        seeds.append(framed(json.dumps(few).encode(), bytes(stop)))
    tiny = {
        "none": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]},
        "some": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "more": {"dtype": "U8", "shape": [], "data_offsets": [16, 17]},
        "__metadata__": {"format": "pt"},
    }
    return [*seeds, framed(json.dumps(tiny).encode(), bytes(17))]


def _place_header(data: bytes, folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(data)
    return file


def _read_header(file: Path) -> None:
    from flexinfer.formats.safetensors import read_header

    end_bytes = 0
    for spec in read_header(file):
        assert end_bytes <= spec.offset_bytes or not spec.nbytes, f"{spec} overlaps"
        end_bytes = max(end_bytes, spec.offset_bytes + spec.nbytes)
    assert end_bytes <= file.stat().st_size, f"{end_bytes} is behind the end of the file"


def _index_seeds(folder: Path) -> list[bytes]:
    small_checkpoint("llama", folder / "sharded", max_shard_size="4KB")
    index = folder / "sharded" / "model.safetensors.index.json"
    return [json.dumps(json.loads(index.read_text())).encode()]


def _place_index(data: bytes, folder: Path) -> Path:
    (folder / "sharded" / "model.safetensors.index.json").write_bytes(data)
    return folder / "sharded"


def _open_index(folder: Path) -> None:
    from flexinfer.formats.checkpoint import open_checkpoint

    for file in open_checkpoint(folder).files:
        assert file.parent == folder, f"{file} is outside"


def _config_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for family in SMALL_MODELS:
        path = small_checkpoint(family, folder / family)
        files = [path / "config.json", path / "generation_config.json"]
        seeds.append(
            b"\n".join(json.dumps(json.loads(file.read_text())).encode() for file in files)
        )
    return seeds


def _place_config(data: bytes, folder: Path) -> Path:
    """Line 1 is config.json, the rest generation_config.json.

    The weights are those of the family that it names.
    """
    config, _, generation = data.partition(b"\n")
    try:
        values = json.loads(config)
        family = values["model_type"]
        path = folder / (family if family in SMALL_MODELS else "llama")
    except (ValueError, TypeError, KeyError, RecursionError):
        path = folder / "llama"
    (path / "config.json").write_bytes(config)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (path / "generation_config.json").write_bytes(generation)
    return path


def _build(path: Path) -> None:
    """What `from_pretrained` does with a configuration."""
    from flexinfer.formats.checkpoint import open_checkpoint
    from flexinfer.model.match import NotStreamableError
    from flexinfer.model.skeleton import build_skeleton
    from flexinfer.model.whole import whole_model_bytes, whole_skeleton

    checkpoint = open_checkpoint(path)
    try:
        skeleton = build_skeleton(checkpoint)
    except NotStreamableError:
        whole_model_bytes(whole_skeleton(checkpoint, "auto"), 32)
    else:
        assert skeleton.meter.planned_bytes(32, 1) > 0


def _gguf_seeds(folder: Path) -> list[bytes]:
    seeds = [
        small_gguf(architecture, folder / f"{architecture}.gguf")[0] for architecture in SMALL_GGUFS
    ]
    parts = small_gguf("llama", folder / "parts.gguf", parts=2)
    for i in range(2):  # an input that says it is part i of a model has the other one beside it
        (folder / f"split-{i}").mkdir()
        (folder / f"split-{i}" / PARTS[1 - i]).write_bytes(parts[1 - i])
    (folder / KEPT).mkdir()
    return [*seeds, *parts]


def _place_gguf(data: bytes, folder: Path) -> Path:
    """The folder that holds the input and another part, where it has the number of a part.

    Otherwise the file.
    """
    at = data.find(b"split.no")
    if at < 0:
        path = file = folder / "model.gguf"
    else:
        # Behind the key and its type.
        number = int.from_bytes(data[at + 12 : at + 13], "little") % 2
        path = folder / f"split-{number}"
        file = path / PARTS[number]
    file.write_bytes(data)
    return path


def _build_gguf(path: Path) -> None:
    """What `from_pretrained` does with a GGUF file, but for the tokenizer, which another process
    makes.
    """
    from flexinfer.formats.gguf import read_gguf
    from flexinfer.formats.gguf_config import config_of
    from flexinfer.formats.gguf_model import gguf_in, write_config
    from flexinfer.formats.gguf_tokenizer import ARRAYS
    from flexinfer.formats.tensors import Checkpoint
    from flexinfer.model.skeleton import build_skeleton

    file = gguf_in(path)
    assert file is not None
    gguf = read_gguf(file)
    for part in gguf.files:
        end_bytes = 0
        for spec in gguf.tensors.values():
            if spec.file == part:
                assert end_bytes <= spec.offset_bytes, f"{spec} overlaps"
                end_bytes = spec.offset_bytes + spec.nbytes
        assert end_bytes <= part.stat().st_size, f"{end_bytes} is behind the end of the file"
    assert read_gguf(file, [f"tokenizer.ggml.{name}" for name in ARRAYS]).tensors == gguf.tensors
    kept = path.parent / KEPT
    write_config(config_of(gguf), kept)
    skeleton = build_skeleton(Checkpoint(file, gguf.tensors, kept, gguf.architecture))
    assert skeleton.meter.planned_bytes(32, 1) > 0


def _record_seeds(folder: Path) -> list[bytes]:
    """A line of each experiment that has been recorded here, and a small one."""
    from experiments.record_files import QUALITY, RELIABILITY
    from experiments.records import Record

    files = [
        file
        for file in sorted((ROOT / "results").rglob("*.jsonl"))
        if file.parent.name not in (QUALITY, RELIABILITY)
    ]
    lines = [
        line for file in files for line in file.read_bytes().splitlines()[:1] if len(line) < 8_192
    ]
    record = Record.model_validate(SMALL_RECORD).model_dump_json().encode()
    return [record + b"\n", *(line + b"\n" for line in lines if b'"run_id"' in line)]


def _place_records(data: bytes, folder: Path) -> Path:
    file = folder / "records.jsonl"
    file.write_bytes(data)
    return file


def _read_records(file: Path) -> None:
    from experiments.record_files import load_records
    from experiments.records import Record, with_common_costs

    records = load_records(file)
    for record in [*records, *with_common_costs(records)]:
        assert record.cell_key
    for record in records:
        assert Record.model_validate_json(record.model_dump_json()) == record, (
            "is not read back as it was"
        )


def _record_errors() -> tuple[type[Exception], ...]:
    from experiments.records import RecordError

    return (RecordError,)


TARGETS: dict[str, Target] = {
    "header": Target(
        seeds=_header_seeds,
        place=_place_header,
        read=_read_header,
        errors=_checkpoint_errors,
        modules=("flexinfer.formats",),
        keys=lambda: {
            "dtype": ["F64", "BF16", "BOOL", "F8_E4M3"],
            "shape": [[], [0], [2**40, 2**40]],
            "data_offsets": [[0, 0], [0, 2**63], [1]],
            "__metadata__": [{"format": "pt"}],
        },
        change=change_framed,
    ),
    "index": Target(
        seeds=_index_seeds,
        place=_place_index,
        read=_open_index,
        errors=_checkpoint_errors,
        modules=("flexinfer.formats",),
        keys=lambda: {
            "weight_map": [{}, {"a": "model.safetensors"}],
            "metadata": [{"total_size": -1}],
            "lm_head.weight": ["../model.safetensors", "config.json", "/proc/self/mem", "."],
        },
    ),
    "config": Target(
        seeds=_config_seeds,
        place=_place_config,
        read=_build,
        errors=_checkpoint_errors,
        modules=(
            "flexinfer.model",
            "flexinfer.formats",
            "flexinfer.streaming.kv_cache",
            "huggingface_hub.dataclasses",
            "transformers.cache_utils",
            "transformers.configuration_utils",
            "transformers.generation.configuration_utils",
            "transformers.masking_utils",
            "transformers.modeling_rope_utils",
            "transformers.models",
        ),
        keys=config_keys,
    ),
    "gguf": Target(
        seeds=_gguf_seeds,
        place=_place_gguf,
        read=_build_gguf,
        errors=_checkpoint_errors,
        modules=(
            "flexinfer.model",
            "flexinfer.formats",
            "transformers.configuration_utils",
            "transformers.modeling_gguf_pytorch_utils",
            "transformers.modeling_rope_utils",
        ),
        keys=gguf_keys,
        change=change_gguf,
    ),
    "records": Target(
        seeds=_record_seeds,
        place=_place_records,
        read=_read_records,
        errors=_record_errors,
        modules=("experiments.config", "experiments.records"),
        keys=lambda: {
            "cell": [{}],
            "limits": [{"method": "v1"}],
            "engine": [{"a": 1}],
            "ratio": [None],
        },
    ),
}
