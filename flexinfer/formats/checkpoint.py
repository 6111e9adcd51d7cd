"""Read-only index of a checkpoint: which tensor lies where.

A checkpoint is a directory with `config.json` and either `model.safetensors` or shards named by
`model.safetensors.index.json`; or a GGUF file (flexinfer.formats.gguf). Opening one reads the headers alone (a few KB a file) and
checks every offset against the file, so that a damaged checkpoint is refused before memory is planned. The bytes themselves are read
later, by `flexinfer.streaming.prefetch`, straight from the offsets found here: nothing is converted and no second copy is made.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON header, data).
"""

from dataclasses import dataclass
from pathlib import Path

from flexinfer.formats.safetensors import INDEX_FILE, SINGLE_FILE, _read_index, read_header
from flexinfer.formats.tensors import CheckpointError, TensorSpec


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint, by name."""

    path: Path  # of the directory, or of the (first) GGUF file
    tensors: dict[str, TensorSpec]
    config_dir: Path  # where config.json and the tokenizer lie
    architecture: str | None = None  # llama.cpp's name of it, where the tensors' names are llama.cpp's

    @property
    def in_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.suffix == ".gguf"

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Index the checkpoint in directory `path`, or the GGUF file `path`, or the only one in the directory.

        Raises CheckpointError when it is not a checkpoint, a shard is missing or truncated, a header lies about sizes
        or overlaps, the index points outside the directory, or a tensor has a type that is not supported.
        """
        path = Path(path)
        from flexinfer.formats.gguf_model import gguf_in, open_gguf  # they need the classes above

        gguf_file = gguf_in(path)
        if gguf_file is not None:
            return open_gguf(gguf_file)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such directory or .gguf file; expected a Hugging Face checkpoint (config.json and *.safetensors)"
            )
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: not a checkpoint: config.json is missing; save it with model.save_pretrained()"
            )
        if (path / INDEX_FILE).is_file():
            return cls(path, _read_index(path), path)
        if (path / SINGLE_FILE).is_file():
            return cls(path, {spec.name: spec for spec in read_header(path / SINGLE_FILE)}, path)
        other = sorted(
            p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
        )
        found = f" (found {', '.join(other[:4])})" if other else ""
        raise CheckpointError(
            f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}; load the model with transformers and save it with "
            "model.save_pretrained(), which writes safetensors"
        )

    @property
    def config_file(self) -> Path:
        """The file that says what the model is: config.json, or the GGUF file that it was made of."""
        return self.path if self.architecture else self.config_dir / "config.json"

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, each once."""
        return sorted({spec.file for spec in self.tensors.values()})
