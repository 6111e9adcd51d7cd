"""Runs what the notebooks draw, one experiment after another, and goes on where it was stopped:
python scripts/reproduce.py [--list].

The steps and their minutes are those of conf/reproduce.yaml; each is a call of scripts/run.py,
whose finished cells are not run again. Before each step it says how many hours are left. A step
whose run fails ends it: mend what it says, and call it again.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.config import RunConfig
from experiments.provenance import provenance
from experiments.runner import cells_of, finished_keys
from flexinfer.cache_dir import cache_dir

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Step:
    """One run of scripts/run.py."""

    overrides: list[str]
    minutes: float  # from nothing
    keys: frozenset[str]  # of its cells

    @property
    def command(self) -> str:
        return " ".join(["python scripts/run.py", *self.overrides])

    def minutes_left(self, finished: set[str]) -> float:
        """By the share of its cells that are not finished."""
        return self.minutes * len(self.keys - finished) / len(self.keys)


def steps_of(file: Path, common: list[str]) -> list[Step]:
    """The steps of `file`, each with the overrides `common` as well."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    steps = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for told in cast(list[dict[str, Any]], OmegaConf.to_object(OmegaConf.load(file))):
            overrides = [*told["run"], *common]
            keys = frozenset(
                cell.key
                for swept in _sweep(overrides)
                for cell in cells_of(
                    cast(
                        RunConfig,
                        OmegaConf.to_object(compose("config", overrides=[*overrides, *swept])),
                    )
                )
            )
            steps.append(Step(overrides, float(told["minutes"]), keys))
    return steps


def _sweep(overrides: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job of an experiment that sweeps values by itself
    (hydra.sweeper.params); one of none for the others.
    """
    params = (
        compose("config", overrides=overrides, return_hydra_config=True).hydra.sweeper.params or {}
    )
    return list(
        product(
            *(
                [f"{name}={value}" for value in str(told).split(",")]
                for name, told in params.items()
            )
        )
    )


def left_table(steps: list[Step], finished: set[str]) -> Table:
    """A line for each step: its cells, how many are finished, minutes left."""
    table = Table("command", "cells", "finished", "minutes left")
    for step in steps:
        done = len(step.keys & finished)
        table.add_row(
            step.command, str(len(step.keys)), str(done), f"{step.minutes_left(finished):.0f}"
        )
    return table


def main() -> int:
    """Runs the steps that have cells left, or lists them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="say what there is and what is left; run nothing"
    )
    parser.add_argument("--results-dir", type=Path, default=ROOT / "results")
    parser.add_argument("--rounds", type=int, help="instead of each experiment's own")
    parser.add_argument("--steps", type=Path, default=ROOT / "conf" / "reproduce.yaml")
    arguments = parser.parse_args()
    console = Console()
    common = [f"results_dir={arguments.results_dir}"]
    if arguments.rounds:
        common.append(f"rounds={arguments.rounds}")
    steps = steps_of(arguments.steps, common)
    here = provenance(cache_dir())

    def look() -> tuple[set[str], float]:
        """The keys of what is finished by now, and the hours left."""
        finished = finished_keys(arguments.results_dir, here)
        return finished, sum(one.minutes_left(finished) for one in steps) / 60

    if arguments.list:
        finished, hours = look()
        console.print(left_table(steps, finished))
        console.print(f"about {hours:.1f} hours left on {here.machine}")
        return 0
    for number, step in enumerate(steps):
        finished, hours = look()
        if step.keys <= finished:
            continue
        console.print(
            f"step {number + 1} of {len(steps)}, about {hours:.1f} hours left: {step.command}"
        )
        code = subprocess.run(
            [sys.executable, "scripts/run.py", *step.overrides], cwd=ROOT, check=False
        ).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
