"""Runs an experiment: python scripts/run.py +exp=fig5. See --help, and conf/exp/ for what there is.

Hydra composes conf/ into the schema of experiments/config.py; one Hydra job is one comparison,
whose cells experiments.runner measures in turns. With -m Hydra runs several (models, devices), here
or on other machines by a launcher plugin; the systems of one comparison stay on one machine.
"""

import re
import signal
import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.cell import run_cell
from experiments.config import RunConfig
from experiments.model_config import ConfigError, require
from experiments.provenance import provenance
from experiments.record_files import load_records
from experiments.runner import cells_of, results_tables, run

ConfigStore.instance().store(name="schema", node=RunConfig)


def comparisons(config: DictConfig, overrides: list[str]) -> list[RunConfig]:
    """The comparison that `config` describes, or those of the experiments it includes, with the
    same `overrides`.
    """
    if not config.include:
        return [cast(RunConfig, OmegaConf.to_object(config))]
    kept = [one for one in overrides if not one.startswith(("+exp=", "experiment=", "include="))]
    given = {one.partition("=")[0] for one in kept}
    configs = []
    for told in config.include:
        own = [one for one in f"+exp={told}".split() if one.partition("=")[0] not in given]
        composed = hydra.compose("config", overrides=[*own, *kept])
        configs.append(cast(RunConfig, OmegaConf.to_object(composed)))
    return configs


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Measures what is missing, then prints a table of the experiment's records."""
    console = Console()
    # In the background a shell leaves SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        configs = comparisons(config, list(HydraConfig.get().overrides.task))
        here = provenance(Path(config.cache_dir))
        summary = run(configs, run_cell, here, console)
        wanted = {cell.key for one in configs for cell in cells_of(one)}
        records = load_records(config.results_dir) if Path(config.results_dir).exists() else []
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = [one for one in records if one.cell_key in wanted and one.provenance.comparable(here)]
    for table in results_tables(found):
        console.print(table)
    if summary.interrupted:
        console.print("stopped: every finished cell is kept; the same command goes on from here")
        sys.exit(130)


def check_systems(
    arguments: list[str], systems: Path = Path(__file__).parents[1] / "conf" / "system"
) -> None:
    """Raises ConfigError for a system=[...] that is not there: for a list Hydra does not say what
    is.
    """
    known = sorted(file.stem for file in systems.glob("*.yaml"))
    for argument in arguments:
        names = (
            re.split(r"[\[\], ]+", argument.removeprefix("system="))
            if argument.startswith("system=")
            else []
        )
        for name in filter(None, names):
            require(name in known, "system", name, f"one of {', '.join(known)}")


if __name__ == "__main__":
    try:
        check_systems(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    main()
