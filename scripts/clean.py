"""Deletes synthetic checkpoints from the cache directory: python scripts/clean.py [MODEL ...]
[--list].
"""

import argparse
from pathlib import Path

from experiments.runner import checkpoints, delete_checkpoints, size_bytes
from flexinfer.cache_dir import cache_dir
from flexinfer.sizes import format_size


def main() -> None:
    """Lists or deletes what experiments have made; records and figures are not touched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="*", help="names such as llama2-7b; without any, all")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    arguments = parser.parse_args()
    if arguments.list:
        for path in checkpoints(arguments.cache_dir):
            print(f"{format_size(size_bytes(path)):>12}  {path}")
        return
    freed = sum(delete_checkpoints(arguments.cache_dir, name) for name in arguments.model or [None])
    print(f"freed {format_size(freed)}")


if __name__ == "__main__":
    main()
