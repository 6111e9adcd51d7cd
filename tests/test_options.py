"""What a model is loaded with is declared and checked in one place."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import flexinfer
from experiments.config import SystemConfig
from experiments.model_config import ConfigError
from flexinfer import BudgetError, Experiment, Options

USAGE = (Path(__file__).parents[1] / "docs" / "usage.md").read_text(encoding="utf-8")


def test_from_pretrained_shows_every_option_with_its_default() -> None:
    parameters = inspect.signature(flexinfer.from_pretrained).parameters
    path, memory, *rest = parameters.values()
    assert (path.name, memory.name) == ("path_or_hub_id", "memory")
    assert memory.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in rest)
    assert {one.name: one.default for one in (memory, *rest)} == {
        one.name: one.default for one in dataclasses.fields(Options)
    }


def test_the_docs_and_the_help_name_every_option() -> None:
    table = USAGE[USAGE.index("| option | meaning |") :].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {
        one.name for one in dataclasses.fields(Options)
    }
    settings = USAGE[USAGE.index("| setting | meaning |") :].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE)) == {
        one.name for one in dataclasses.fields(Experiment)
    }
    for kind in (Options, Experiment):
        for one in dataclasses.fields(kind):
            assert f"{one.name}: {one.metadata['meaning']}" in str(kind.__doc__)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"memory": "4 bananas"}, "memory='4 bananas' is not a size"),
        ({"memory": 0}, "memory=0 must be at least 1 byte"),
        ({"window": "0 layers"}, "window='0 layers'"),
        ({"policy": "best"}, "policy='best' does not exist; there are"),
        (
            {"experiment": {"expert_policy": "best"}},
            "expert_policy='best' does not exist; there are",
        ),
        ({"io_threads": -1}, "io_threads=-1 must be 0"),
        ({"experiment": {"read_timeout_s": 0.0}}, "read_timeout_s=0.0 must be more than 0"),
        ({"experiment": {"read_timeout_s": 5.0}, "io_threads": 0}, "needs a reader thread"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"logits_to_keep": 0}, "logits_to_keep=0 must be at least 1"),
        ({"dtype": "int3"}, "dtype='int3' is not supported; choose one of auto"),
        ({"kv_dtype": "int3"}, "kv_dtype='int3' is not supported"),
        ({"experiment": {"draft_type": "q8_0"}}, "draft_type='q8_0' needs a draft"),
        ({"draft": "auto", "experiment": {"draft_tokens": 0}}, "draft_tokens=0 must be at least 1"),
        (
            {"draft": "lookup", "experiment": {"draft_dir": "/tmp"}},
            "draft='lookup' has no substitute",
        ),
        ({"experiment": 3}, "experiment=3 must be a flexinfer.Experiment"),
        ({"trace": "/nothing/here/run.json"}, "cannot be written"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_opened(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        flexinfer.from_pretrained("no/such/model", **wrong)


def test_sizes_that_are_none_are_budget_errors() -> None:
    for name in ("memory", "window"):
        with pytest.raises(BudgetError, match=name):
            Options(**{name: "bananas"})


def test_a_misspelt_option_is_told_the_right_one() -> None:
    with pytest.raises(TypeError, match="no option 'io_thread'; did you mean 'io_threads'"):
        flexinfer.from_pretrained("no/such/model", io_thread=3)
    with pytest.raises(
        TypeError, match=r"pass experiment=flexinfer.Experiment\(read_ahead=False\)"
    ):
        flexinfer.from_pretrained("no/such/model", read_ahead=False)
    with pytest.raises(TypeError, match="readahead"):
        flexinfer.from_pretrained("no/such/model", experiment={"readahead": False})


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().context = 3  # type: ignore[misc]


def test_a_typo_in_an_experiment_is_found_when_it_is_composed() -> None:
    SystemConfig(
        "ours", "ours", options={"policy": "unbalanced", "python": "/usr/bin/python3"}
    ).check_options()
    for options in ({"polcy": "unbalanced"}, {"policy": "unbalance"}):
        with pytest.raises(ConfigError, match=r"system.options of ours: .*(polcy|unbalance)"):
            SystemConfig("ours", "ours", options=options).check_options()
