"""What we use of torch and transformers beyond their documented names is listed here, and is there
in what is installed.

`make test` runs this with the pinned versions. At other ends of the ranges in pyproject.toml:
install those versions beside pytest, and run `python -m pytest --noconftest
tests/test_private_names.py`.
"""

import ast
import importlib
from pathlib import Path

import pytest
import transformers

PACKAGE = Path(__file__).parents[1] / "flexinfer"
# Modules that their documentation does not promise to keep, and what is taken of each.
PRIVATE = {
    "torch.autograd.function": {"once_differentiable"},
    "torch.overrides": {"TorchFunctionMode"},
    "torch.utils._python_dispatch": {"TorchDispatchMode"},
    "transformers.cache_utils": {
        "CacheLayerMixin",
        "DummyLayer",
        "DynamicIndexedLayer",
        "DynamicLayer",
        "LinearAttentionCacheLayerMixin",
    },
    "transformers.cli.serving.chat_completion": {"ChatCompletionHandler"},
    "transformers.cli.serving.completion": {"CompletionHandler"},
    "transformers.cli.serving.model_manager": {"ModelManager"},
    "transformers.cli.serving.response": {"ResponseHandler"},
    "transformers.cli.serving.server": {"build_server"},
    "transformers.cli.serving.utils": {
        "BaseHandler",
        "GenerationState",
        "_StreamError",
        "get_response_template",
        "response_events_to_chunks",
    },
    "transformers.conversion_mapping": {"get_model_conversion_mapping"},
    "transformers.core_model_loading": {
        "Concatenate",
        "MergeModulelist",
        "WeightConverter",
        "WeightRenaming",
        "apply_renamings",
        "rename_source_key",
    },
    "transformers.integrations.gguf.gguf_tokenizer_mapping": {
        "GGUF_PRE_TOKENIZER_SPLITS",
        "GGUF_TOKENIZER_MAPPING",
        "convert_gguf_tokenizer",
    },
    "transformers.integrations.moe": {"ExpertsInterface"},
    "transformers.pytorch_utils": {"Conv1D"},
}
# Attributes with a leading underscore, of objects of theirs.
ATTRIBUTES = {
    *(
        "_C",
        "_cdata",
        "_non_persistent_buffers_set",
        "_is_param",
        "_make_subclass",
        "_schema",
        "_to_copy",
    ),  # torch
    # Transformers.
    *(
        "_apply_gate",
        "_attn_implementation",
        "_init_weights",
        "_experts_implementation",
        "_from_config",
    ),
    *("_eos_token_tensor", "_pad_token_tensor", "_generation_defaults"),
    *("_non_streaming", "_normalize_response_items"),  # of its server's handlers
}
OF_PYTHON = {"_getframe"}


def engine_files() -> list[Path]:
    return list(PACKAGE.rglob("*.py"))


def imported() -> dict[str, set[str]]:
    """Names that the engine takes from modules of torch or transformers below the top."""
    found: dict[str, set[str]] = {}
    for file in engine_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                top, _, below = node.module.partition(".")
                if (
                    top in ("torch", "transformers")
                    and below
                    and node.module != "transformers.utils"
                ):
                    found.setdefault(node.module, set()).update(one.name for one in node.names)
    return found


def test_the_list_is_what_the_engine_imports() -> None:
    assert imported() == PRIVATE


@pytest.mark.parametrize("module", PRIVATE)
def test_the_names_are_there(module: str) -> None:
    if module.startswith("transformers.cli.serving"):
        pytest.importorskip("fastapi")  # of the extra `serve`
    there = importlib.import_module(module)
    assert {name for name in PRIVATE[module] if hasattr(there, name)} == PRIVATE[module]


def test_no_other_attribute_of_theirs_is_private() -> None:
    """An attribute with an underscore is one of ours, of Python's, or listed."""
    ours, used = set(), set()
    for file in engine_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.endswith("__")
            ):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (ours if of_self else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
    assert used - ours - OF_PYTHON == ATTRIBUTES


def test_a_model_keeps_how_attention_and_experts_are_computed() -> None:
    config = transformers.LlamaConfig()
    config._experts_implementation = "eager"
    assert hasattr(config, "_attn_implementation")
