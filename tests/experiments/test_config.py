"""The experiments' configuration: what is there composes, what is not is refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments.config import (
    CellConfig,
    RunConfig,
    SystemConfig,
    WorkloadConfig,
    comparison_format,
    from_dict,
    resolve_budget_bytes,
)
from experiments.model_config import ConfigError, ModelConfig, ShapeConfig, weight_bytes
from experiments.runner import cells_of
from tests.experiments.samples import ROOT, make_cell, script

EXP = ROOT / "conf" / "exp"
EXPERIMENTS = sorted(str(file.relative_to(EXP).with_suffix("")) for file in EXP.rglob("*.yaml"))
GROUPS = ("model", "system", "device", "budget", "workload")


@pytest.fixture(scope="module")
def run_script() -> ModuleType:
    """scripts/run.py as a module: importing it registers the schema."""
    return script("run")


@pytest.fixture
def load(run_script: ModuleType) -> Callable[..., RunConfig]:
    """Composes overrides into a RunConfig, as scripts/run.py does."""

    def loaded(*overrides: str) -> RunConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return cast(
                RunConfig, OmegaConf.to_object(compose("config", overrides=list(overrides)))
            )

    return loaded


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_into_cells(name: str, load: Callable[..., RunConfig]) -> None:
    config = load(f"+exp={name}")
    assert config.experiment == Path(name).name
    cells = cells_of(config)
    assert (
        len({cell.key for cell in cells})
        == len(cells)
        == config.rounds * len(config.budget.grid) * len(config.systems)
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_starts_with_figure_command_and_minutes(name: str) -> None:
    lines = (EXP / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[2].startswith(f"# python scripts/run.py +exp={name}")
    assert "minute" in lines[3]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes_under_its_own_name(
    group: str, load: Callable[..., RunConfig]
) -> None:
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        extra = ["model.path=/a/model"] if file.stem == "path" else []
        config = load(f"{group}={file.stem}", *extra)
        if group == "system":
            assert list(config.systems) == [file.stem]
            assert config.systems[file.stem].name == file.stem
        elif group != "budget":
            assert getattr(config, group).name == ("model" if file.stem == "path" else file.stem)


def test_overrides_win_over_the_experiment(load: Callable[..., RunConfig]) -> None:
    config = load(
        "+exp=fig5",
        "model=llama2-13b",
        "device=phone",
        "rounds=5",
        "budget.grid=[2GiB]",
        "system=[sync]",
    )
    assert (config.model.name, config.device.name, config.rounds) == ("llama2-13b", "phone", 5)
    assert [cell.budget_bytes for cell in cells_of(config)] == [2 * 2**30] * 5


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("roundz=3", "roundz"),
        ("workload.min_token=3", "min_token"),
        ("model=llama9", "llama2-7b"),
        ("+exp=fig6", "fig5"),
        ("device=floppy", "emmc"),
        ("rounds=many", "rounds"),
        ("systems.flexinfer.polisy=none", "polisy"),
    ],
)
def test_a_typo_fails_and_names_what_there_is(
    override: str, named: str, load: Callable[..., RunConfig]
) -> None:
    with pytest.raises(HydraException) as failure:
        load(override)
    messages = f"{failure.value} {failure.value.__cause__}"
    assert named in messages


def test_a_typo_inside_an_experiment_file_fails(
    tmp_path: Path, load: Callable[..., RunConfig]
) -> None:
    exp = tmp_path / "exp"
    exp.mkdir()
    (exp / "typo.yaml").write_text("# @package _global_\nexperiment: typo\nround: 3\n")
    with pytest.raises(HydraException, match="Key 'round' not in"):
        load(f"hydra.searchpath=[file://{tmp_path}]", "+exp=typo")


def test_a_wrong_system_in_a_list_is_answered_with_the_right_ones(run_script: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"flexinferr.*llama-cpp-mmap"):
        run_script.check_systems(["+exp=fig4", "system=[sync,flexinferr]"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rounds=0", "rounds"),
        ("model=path", "model.path"),
        ("budget.grid=[4 bananas]", "bananas"),
        ("budget.grid=[]", "budget.grid"),
        ("workload.min_tokens=100", "workload.min_tokens"),
        ("workload.context=10", "workload.context"),
        ("workload.prefill_tokens=[512]", "workload.context"),
        ("device.cores=0", "device.cores"),
        ("model.shape.heads=7", "model.shape.heads"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(
    override: str, named: str, load: Callable[..., RunConfig]
) -> None:
    with pytest.raises((ValueError, HydraException)) as failure:
        load(override.replace("[4 bananas]", "['4 bananas']"))
    assert named in f"{failure.value} {failure.value.__cause__}"


def test_claims_includes_every_experiment_that_a_claim_is_judged_by(
    run_script: ModuleType, load: Callable[..., RunConfig]
) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        claims = compose("config", overrides=["+exp=claims", "rounds=1"])
        configs = run_script.comparisons(claims, ["+exp=claims", "rounds=1"])
    included = {cell.key for config in configs for cell in cells_of(config)}
    told = json.loads((ROOT / "results" / "paper.json").read_text())["claims"]
    for claim in told.values():
        wanted = cells_of(load(*f"+exp={claim['experiment']}".split(), "rounds=1"))
        assert {cell.key for cell in wanted} <= included


def test_what_is_given_goes_before_what_claims_say_of_their_experiments(
    run_script: ModuleType,
) -> None:
    given = ["+exp=claims", "model=smoke", "budget.grid=[800MiB]", "system=[flexinfer]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        configs = run_script.comparisons(compose("config", overrides=given), given)
    assert {cell.model.name for config in configs for cell in cells_of(config)} == {"smoke"}


def test_figures_share_their_cells(load: Callable[..., RunConfig]) -> None:
    fig4, fig5, table1 = (
        {cell.key for cell in cells_of(load(f"+exp={name}"))} for name in ("fig4", "fig5", "table1")
    )
    assert table1 < fig4
    assert fig4 & fig5


def test_systems_take_turns_within_a_round(load: Callable[..., RunConfig]) -> None:
    cells = cells_of(load("system=[sync,flexinfer]", "budget.grid=[1GiB,2GiB]", "rounds=2"))
    turns = [(cell.round, cell.budget_bytes // 2**30, cell.system.name) for cell in cells]
    assert turns == [(r, b, s) for r in (0, 1) for b in (1, 2) for s in ("sync", "flexinfer")]


def test_a_cell_survives_json() -> None:
    cell = make_cell(
        system=SystemConfig(
            "x", "X", format="q4_k", options={"window": "3 layers", "io_threads": 0}
        )
    )
    assert from_dict(CellConfig, json.loads(json.dumps(asdict(cell)))) == cell


def test_an_unknown_field_of_a_cell_is_refused_by_name() -> None:
    told = asdict(make_cell())
    told["model"]["shape"]["experts"] = 8
    with pytest.raises(ConfigError, match="experts"):
        from_dict(CellConfig, told)


def test_a_missing_field_of_a_cell_is_refused_by_name() -> None:
    told = asdict(make_cell())
    del told["round"]
    with pytest.raises(ConfigError, match="round"):
        from_dict(CellConfig, told)


def test_the_key_of_a_cell_is_what_is_measured_and_not_who_asks() -> None:
    cell = make_cell()
    assert cell.key == make_cell(experiment="other", cache_dir="/elsewhere").key
    for change in (
        {"round": 1},
        {"budget_bytes": 2**31},
        {"trace": True},
        {"workload": WorkloadConfig(min_tokens=4)},
        {"workload": WorkloadConfig(prefill_tokens=[16])},
    ):
        assert cell.key != make_cell(**change).key


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.5, 500),
        (1, 1000),
        ("0.5", 500),
        ("2GiB", 2**31),
        (2**31, 2**31),
        ("1400MiB", 1400 * 2**20),
        (1.25, 1250),
    ],
)
def test_budgets_are_sizes_or_fractions_of_the_model(
    budget: float | int | str, expected: int
) -> None:
    assert resolve_budget_bytes(budget, 1000) == expected


def test_seven_billion_weights_at_four_and_a_half_bits_are_3_7_gigabytes(
    load: Callable[..., RunConfig],
) -> None:
    shape = load("model=llama2-7b").model.shape
    assert shape is not None
    assert weight_bytes(shape, "q4_0") == weight_bytes(shape, "q4_k")
    assert 3.7e9 < weight_bytes(shape, "q4_0") < 3.75e9


def test_all_systems_of_a_comparison_run_one_format() -> None:
    shape = ShapeConfig(64, 128, 2, 4, 2, 256)
    model = ModelConfig("m", formats=["bf16", "q4_0", "q4_k"], shape=shape)
    ours, llama = SystemConfig("a", "A"), SystemConfig("b", "B", kind="llama_cpp")
    stock = SystemConfig("c", "C", kind="transformers", format="bf16")
    assert comparison_format(model, [ours]) == "bf16"
    assert (
        comparison_format(model, [ours, llama]) == comparison_format(model, [llama, ours]) == "q4_0"
    )
    assert comparison_format(model, [ours, stock]) == "bf16"
    assert comparison_format(model, [ours, llama], "q4_k") == "q4_k"
    for systems, format, named in (
        ([llama], "bf16", "system='b'.*bf16"),
        ([llama, stock], "auto", "system='c'.*q4_0 or q4_k"),
        ([ours], "q4_1", "format='q4_1'.*q4_0, q4_k"),
    ):
        with pytest.raises(ConfigError, match=named):
            comparison_format(model, systems, format)


def test_the_figures_compare_on_one_file_and_a_k_quant_is_one_word_away(
    load: Callable[..., RunConfig],
) -> None:
    for name in ("fig4", "fig5", "table1", "smoke", "sizes", "ours/targets", "ours/resident"):
        assert {cell.system.format for cell in cells_of(load(f"+exp={name}"))} == {"q4_0"}
        cells = cells_of(load(f"+exp={name}", "format=q4_k"))
        assert {(cell.system.format, *cell.model.formats) for cell in cells} == {("q4_k", "q4_k")}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.formats=[int4]"], "model.formats"),
        (["systems.flexinfer.format=int4"], "system.format"),
        (["format=int4"], "format"),
        (["model.formats=[gguf]"], "model.formats"),
    ],
)
def test_the_format_of_old_records_cannot_be_measured(
    overrides: list[str], named: str, load: Callable[..., RunConfig]
) -> None:
    with pytest.raises((ConfigError, HydraException)) as refused:
        cells_of(load("system=[flexinfer]", *overrides))
    assert named in f"{refused.value} {refused.value.__cause__}"


def test_a_system_that_cannot_run_the_model_is_refused(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"llama-cpp-mmap.*bf16"):
        cells_of(load("model=llama-3b-like", "system=[llama-cpp-mmap]"))


@pytest.mark.parametrize(
    ("tokens", "counted_s", "enough"),
    [
        (7, 100.0, False),
        (8, 9.9, False),
        (8, 10.0, True),
        (64, 1.0, True),
        (1, 120.0, True),
        (0, 500.0, False),
    ],
)
def test_a_cell_stops_when_it_has_counted_enough(
    tokens: int, counted_s: float, enough: bool
) -> None:
    assert WorkloadConfig().enough(tokens, counted_s) is enough


def test_the_joblib_launcher_composes(load: Callable[..., RunConfig]) -> None:
    assert load("hydra/launcher=joblib", "+exp=smoke").experiment == "smoke"


def test_cfg_job_prints_what_would_run() -> None:
    command = [sys.executable, "scripts/run.py", "+exp=fig5", "device=phone", "--cfg", "job"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    assert "name: phone" in done.stdout
    assert "experiment: fig5" in done.stdout


def test_batches_are_swept_and_older_keys_stay(load: Callable[..., RunConfig]) -> None:
    told = (EXP / "ours" / "batches.yaml").read_text()
    assert "workload.batch: 1,2,4,8,16,32" in told
    cells = [cells_of(load("+exp=ours/batches", f"workload.batch={n}"))[0] for n in (1, 2)]
    assert cells[0].key != cells[1].key
    alone = cells_of(load("+exp=ours/batches", "workload.batch=null"))[0]
    assert alone.key not in (cells[0].key, cells[1].key)
    with pytest.raises((ConfigError, HydraException), match=r"workload\.batch"):
        load("+exp=ours/batches", "workload.batch=0")
    with pytest.raises((ConfigError, HydraException), match=r"workload\.batch"):
        load("+exp=ours/batches", "workload.drawn=true")
