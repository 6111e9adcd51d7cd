"""What can draft for a model, and what does: a substitute of its streamed weights, a small model,
or the text so far.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flexinfer.draft.assistant import Assistant, ModelAssistant
from flexinfer.draft.economics import (
    ACCEPTANCE_OF,
    DEFAULT_TYPE,
    MOST_CANDIDATES,
    DraftChoice,
    DraftCosts,
    Pace,
    acceptance_of,
    plan_draft,
)
from flexinfer.draft.substitute import DraftError, substitute_bytes, substitute_kernels
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.config import load_config
from flexinfer.formats.hub import resolve
from flexinfer.kernels.ggml import GgmlKernel
from flexinfer.model.skeleton import Skeleton
from flexinfer.model.whole import load_whole, whole_model_bytes, whole_skeleton
from flexinfer.plan.plan import Costs, DraftPlan, Plan
from flexinfer.plan.planner import Substitutes
from flexinfer.sizes import BudgetError

# Both are quantised faster than most disks read.
AUTO_TYPES = ("q4_0", "q8_0")
# Two float32 scores for each candidate and token of the vocabulary.
SCORES_BYTES = 8
# Share of the budget that scores may take.
SCORES_SHARE = 1 / 32


@dataclass(frozen=True, slots=True)
class Option:
    """A draft, or none, and what the budget is with it."""

    kind: str | None
    # ggml's type of a substitute.
    type: str
    costs: DraftCosts
    plan: Plan

    @property
    def tokens_per_s(self) -> float:
        """As planned."""
        draft = self.plan.draft
        return (
            draft.predicted_tokens_per_s if draft is not None else self.plan.predicted_tokens_per_s
        )


class Drafts:
    """What can draft for one model, and what does."""

    # The small model, once it is loaded.
    model: PreTrainedModel | None = None

    def __init__(self, choice: DraftChoice, skeleton: Skeleton, dtype: torch.dtype) -> None:
        """Raises DraftError for a draft that cannot be made for this model."""
        self.choice, self.auto, self._dtype = choice, choice.kind == "auto", dtype
        self.kind: str | None = choice.kind if not self.auto else None
        self._vocab = skeleton.config.get_text_config().vocab_size
        self.type = choice.type or DEFAULT_TYPE
        self._kernels: dict[str, dict[str, GgmlKernel]] = {}
        self._substitutes: dict[str, Substitutes] = {}
        self._small: Skeleton | None = None
        # Memory of the small model, by context.
        self._bytes: dict[int, int] = {}
        self.most = choice.candidates or MOST_CANDIDATES
        # Weights of the small model over those of the model.
        self.model_share = 1.0
        self._possible = skeleton.cache.can_forget
        if not self._possible:
            if not self.auto:
                raise DraftError(
                    f"draft={choice.kind!r}: {skeleton.checkpoint.path.name} keeps states that "
                    "candidates which are not accepted cannot be taken out of (linear attention or "
                    "convolutions); leave the draft out"
                )
            return
        if choice.kind in ("substitute", "auto"):
            types = AUTO_TYPES if self.auto and choice.type is None else (self.type,)
            for type in types:
                try:
                    self._add(type, skeleton)
                except DraftError:
                    if not self.auto:
                        raise
        elif choice.kind == "model":
            self._find(choice, skeleton)

    def _add(self, type: str, skeleton: Skeleton) -> None:
        if skeleton.experts is not None or not skeleton.weights:
            what = (
                "a mixture of experts" if skeleton.experts is not None else "kept in memory whole"
            )
            raise DraftError(
                f"draft='substitute': {skeleton.checkpoint.path.name} is {what}, of which no "
                "substitute is made; use draft='lookup', or a small model"
            )
        kernels = substitute_kernels(skeleton.weights, skeleton.kernels, type, skeleton.dtype)
        self._substitutes[type] = substitute_bytes(skeleton.weights, kernels)
        self._kernels[type] = kernels

    def _find(self, choice: DraftChoice, skeleton: Skeleton) -> None:
        assert choice.model is not None
        found = open_checkpoint(resolve(choice.model))
        if found.in_gguf:
            raise DraftError(
                f"draft={str(choice.model)!r}: a draft model has to be in safetensors, this is a "
                "GGUF file"
            )
        vocab = load_config(found).get_text_config().vocab_size
        if vocab != self._vocab:
            raise DraftError(
                f"draft={str(choice.model)!r}: has a vocabulary of {vocab} tokens and the model "
                f"one of {self._vocab}; a draft model needs the model's tokenizer"
            )
        self._small = whole_skeleton(found, self._dtype)
        numbers = sum(spec.nbytes for spec in found.tensors.values())
        self.model_share = numbers / max(
            1, sum(spec.nbytes for spec in skeleton.checkpoint.tensors.values())
        )

    @property
    def kernels(self) -> dict[str, GgmlKernel]:
        """What multiplies substitutes of the present type, by the name of the weight; none where
        there are none.
        """
        return self._kernels.get(self.type, {})

    @property
    def substitutes(self) -> Substitutes | None:
        """Memory of those."""
        return self._substitutes.get(self.type)

    def options(
        self,
        plan_with: Callable[[Substitutes | None], Plan],
        costs: Costs,
        measure: Callable[[], DraftCosts],
    ) -> list["Option"]:
        """The draft that was asked for, or with "auto" all those that the budget has room for, none
        at all among them.

        plan_with: divides the budget, with substitutes of what is streamed or without. measure:
        costs with the kernels of the present type. Raises BudgetError where there is no room for
        the one that was asked for.
        """
        asked = [(self.kind, self.type)]
        if self.auto:
            asked = [(None, self.type)]
            if self._possible:
                asked += [("lookup", self.type), *(("substitute", one) for one in self._kernels)]
        found: list[Option] = []
        costs_of: dict[str, DraftCosts] = {}
        for self.kind, self.type in asked:
            try:
                plan = plan_with(self.substitutes if self.kind == "substitute" else None)
            except BudgetError:
                if not found:
                    raise
                continue
            if self.auto and self.kind == "substitute" and not plan.streamed_bytes:
                # Nothing is streamed, so a draft pass would be a full pass.
                continue
            if self.type not in costs_of:
                costs_of[self.type] = measure()
            draft = self.planned(plan, costs, costs_of[self.type]) if self.kind else None
            found.append(
                Option(self.kind, self.type, costs_of[self.type], replace(plan, draft=draft))
            )
        return found

    def fit(self, budget_bytes: int) -> int:
        """Bound the number of candidates by the memory of their scores, and return it."""
        while self.most * self._vocab * SCORES_BYTES > SCORES_SHARE * budget_bytes:
            if not self.fit_fewer():
                break
        return self.most

    def fit_fewer(self) -> bool:
        """Halve the number of candidates. Returns whether that could be done: it is not when their
        number was given.
        """
        if self.choice.candidates is not None or self.most == 1:
            return False
        self.most //= 2
        return True

    def bytes_beside(self, context: int) -> int:
        """Memory for scores of candidates, and for a small model with its cache of `context`
        tokens.
        """
        if self._small is not None and context not in self._bytes:
            self._bytes[context] = whole_model_bytes(self._small, context)
        return self.most * self._vocab * SCORES_BYTES + self._bytes.get(context, 0)

    def load(self) -> None:
        """Load the small model, in memory of its own: transformers would map its file."""
        assert self._small is not None
        self.model = load_whole(self._small)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()

    def planned(
        self, plan: Plan, costs: Costs, draft_costs: DraftCosts, acceptance: float | None = None
    ) -> DraftPlan:
        """What the present kind gives beside `plan`."""
        assert self.kind is not None
        in_few_bits = self.kind == "substitute"
        if acceptance is None and in_few_bits:
            first = next(iter(self.kernels.values())).type
            acceptance = acceptance_of(8 * first.block_bytes / first.block_elements)
        counts = range(1, self.most + 1)
        if self.choice.candidates is not None:
            counts = range(self.choice.candidates, self.choice.candidates + 1)
        type = self.type if in_few_bits else None
        return plan_draft(
            plan,
            costs,
            draft_costs,
            self.kind,
            type,
            acceptance or ACCEPTANCE_OF[self.kind],
            counts,
        )

    def assistant(
        self,
        model: PreTrainedModel,
        pace: Pace,
        drafting: Callable[[], AbstractContextManager[None]],
        cache_of_text: Callable[[], DynamicCache | None],
    ) -> "Assistant":
        """Who drafts the next text of `model`. drafting: entered while it does. cache_of_text: the
        one that a pass of it has left.
        """
        if self.kind == "lookup":
            return Assistant(model.config, pace)
        if self.model is None:
            return ModelAssistant(model, pace, drafting, cache_of_text)
        own = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return ModelAssistant(self.model, pace, drafting, lambda: own, own=True)

    def serves(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of `generate` can have a draft: one text as token ids, no beams, a cache,
        and no way of its own.
        """
        config = kwargs.get("generation_config") or model.generation_config

        def setting(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        own: tuple[str, ...] = (
            "assistant_model",
            "custom_generate",
            "prompt_lookup_num_tokens",
            "use_mtp",
            "assistant_early_exit",
        )
        own += ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "inputs_embeds")
        return (
            isinstance(ids, torch.Tensor)
            and ids.dim() == 2
            and ids.shape[0] == 1
            and ids.shape[1] > 0
            and (setting("num_beams") or 1) == 1
            and (setting("num_return_sequences") or 1) == 1
            and setting("use_cache") is not False
            and not any(setting(name) for name in own)
        )
