"""Who drafts candidates, and how they reach transformers: as the `assistant_model` of its `generate()`.

transformers' assisted generation keeps of the candidates those that the model would have chosen itself (greedy), or accepts and redraws
them so that the distribution is the model's own (sampling; Leviathan et al., arXiv 2211.17192, algorithm 1). Nothing of that verification is
here: `Assistant` has the few attributes of a model that generation asks of one, and hands candidates in.

The model itself drafts with the KV cache of the text, cropped afterwards: the passes that verify write true keys and values over
those of its candidates. A small model keeps a cache of its own. transformers wants at least one candidate of every assistant: where nothing in
the text is found, the last token once more.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel

from flexinfer.draft.economics import (
    ACCEPTANCE_OF,
    DEFAULT_TYPE,
    MOST_CANDIDATES,
    DraftChoice,
    DraftCosts,
    Pace,
    acceptance_of,
    looked_up,
    plan_draft,
)
from flexinfer.draft.substitute import DraftError, substitute_bytes, substitute_kernels
from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.config import load_config
from flexinfer.formats.hub import resolve
from flexinfer.kernels.ggml import GgmlKernel
from flexinfer.model.resident import load_resident, resident_bytes
from flexinfer.model.skeleton import Skeleton
from flexinfer.plan.budget import Costs, DraftPlan, Plan, Substitutes
from flexinfer.sizes import BudgetError

AUTO_TYPES = ("q4_0", "q8_0")  # both are quantised faster than most disks read

SCORES_BYTES = 8  # a candidate and token of the vocabulary: scores in float32, twice

SCORES_SHARE = 1 / 32  # of the budget, that these may take

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of transformers: ids and scores to scores


@dataclass(frozen=True, slots=True)
class Option:
    """A draft, or none, and what the budget is with it."""

    kind: str | None
    type: str  # of a substitute's blocks
    costs: DraftCosts
    plan: Plan

    @property
    def tokens_per_s(self) -> float:
        """As planned."""
        draft = self.plan.draft
        return draft.predicted_tokens_per_s if draft is not None else self.plan.predicted_tokens_per_s


class Drafts:
    """What can draft for one model, and what does."""

    model: PreTrainedModel | None = None  # a small one, once it is loaded

    def __init__(self, choice: DraftChoice, skeleton: Skeleton, dtype: torch.dtype) -> None:
        """Raises DraftError for a draft that cannot be made for this model."""
        self.choice, self.auto, self._dtype = choice, choice.kind == "auto", dtype
        self.kind: str | None = choice.kind if not self.auto else None
        self._vocab = skeleton.config.get_text_config().vocab_size
        self.type = choice.type or DEFAULT_TYPE
        self._kernels: dict[str, dict[str, GgmlKernel]] = {}
        self._substitutes: dict[str, Substitutes] = {}
        self._checkpoint: Checkpoint | None = None
        self._bytes: dict[int, int] = {}  # of the small model, by context
        self.most = choice.candidates or MOST_CANDIDATES
        self.model_share = 1.0  # of the model's weights, that a small one has
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
            what = "a mixture of experts" if skeleton.experts is not None else "kept in memory whole"
            raise DraftError(
                f"draft='substitute': {skeleton.checkpoint.path.name} is {what}, of which no substitute is made; "
                "use draft='lookup', or a small model"
            )
        kernels = substitute_kernels(skeleton.weights, skeleton.kernels, type, skeleton.dtype)
        self._substitutes[type] = substitute_bytes(skeleton.weights, kernels)
        self._kernels[type] = kernels

    def _find(self, choice: DraftChoice, skeleton: Skeleton) -> None:
        assert choice.model is not None
        self._checkpoint = found = Checkpoint.open(resolve(choice.model))
        if found.in_gguf:
            raise DraftError(
                f"draft={str(choice.model)!r}: a draft model has to be in safetensors, this is a GGUF file"
            )
        vocab = load_config(found).get_text_config().vocab_size
        if vocab != self._vocab:
            raise DraftError(
                f"draft={str(choice.model)!r}: has a vocabulary of {vocab} tokens and the model one of {self._vocab}; a draft model "
                "needs the model's tokenizer"
            )
        numbers = sum(spec.nbytes for spec in found.tensors.values())
        self.model_share = numbers / max(1, sum(spec.nbytes for spec in skeleton.checkpoint.tensors.values()))

    @property
    def kernels(self) -> dict[str, GgmlKernel]:
        """What multiplies substitutes of the present type, by the name of the weight; none where there are none."""
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
        """The draft that was asked for, or with "auto" all those that the budget has room for, none at all among them.

        plan_with: divides the budget, with substitutes of what is streamed or without. measure: costs with the kernels of the present type.
        Raises BudgetError where there is no room for the one that was asked for.
        """
        asked = [(self.kind, self.type)]
        if self.auto:
            asked = [
                (None, self.type),
                ("lookup", self.type),
                *(("substitute", one) for one in self._kernels),
            ]
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
                continue  # its draft passes would be passes
            if self.type not in costs_of:
                costs_of[self.type] = measure()
            draft = self.planned(plan, costs, costs_of[self.type]) if self.kind else None
            found.append(Option(self.kind, self.type, costs_of[self.type], replace(plan, draft=draft)))
        return found

    def fit(self, budget_bytes: int) -> int:
        """Bound the number of candidates by the memory that their scores may take, and return it."""
        if self.choice.candidates is None:
            while self.most > 1 and self.most * self._vocab * SCORES_BYTES > SCORES_SHARE * budget_bytes:
                self.most //= 2
        return self.most

    def bytes_beside(self, context: int) -> int:
        """Memory for scores of candidates, and for a small model with its cache of `context` tokens."""
        if self._checkpoint is not None and context not in self._bytes:
            self._bytes[context] = resident_bytes(self._checkpoint, self._dtype, context)
        return self.most * self._vocab * SCORES_BYTES + self._bytes.get(context, 0)

    def load(self) -> None:
        """Load the small model, in memory of its own: transformers would map its file."""
        assert self._checkpoint is not None
        self.model = load_resident(self._checkpoint, self._dtype).model
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
            plan, costs, draft_costs, self.kind, type, acceptance or ACCEPTANCE_OF[self.kind], counts
        )

    def assistant(
        self,
        model: PreTrainedModel,
        pace: Pace,
        drafting: Callable[[], AbstractContextManager[None]],
        cache_of_text: Callable[[], DynamicCache | None],
    ) -> "Assistant":
        """Who drafts the next text of `model`. drafting: entered while it does. cache_of_text: the one that a pass of it has left."""
        if self.kind == "lookup":
            return Assistant(model.config, pace)
        if self.model is None:
            return ModelAssistant(model, pace, drafting, cache_of_text)
        own = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return ModelAssistant(self.model, pace, drafting, lambda: own, own=True)

    def serves(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of `generate` can have a draft: one text as token ids, no beams, a cache, and no way of its own."""
        config = kwargs.get("generation_config") or model.generation_config

        def told(name: str) -> Any:
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
            and (told("num_beams") or 1) == 1
            and (told("num_return_sequences") or 1) == 1
            and told("use_cache") is not False
            and not any(told(name) for name in own)
        )


class Assistant:
    """Candidates of one text that stand in it already, as `assistant_model` of transformers' `generate()`.

    Of a model it has what assisted generation asks for (transformers 5.24): `config`, `generation_config`, `device`, `generate`.
    """

    device = torch.device("cpu")

    def __init__(self, config: PretrainedConfig, pace: Pace) -> None:
        self.config, self._pace = config, pace
        self._vocab: int = config.get_text_config().vocab_size
        self.generation_config = GenerationConfig(
            num_assistant_tokens=pace.most,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self._drafted: list[int] = []
        self._start = 0  # where they stand in the text
        self._began_s = 0.0  # the pass that verifies them
        self._rounds = 0
        self._guessed = False  # that they are no draft, and say nothing of what is accepted

    def _supports_logits_to_keep(self) -> bool:
        return True

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        generation_config: GenerationConfig,
        logits_processor: Sequence[Process],
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """At least one candidate after input_ids [1, tokens], and the scores [1, vocab] that each was drawn from."""
        ids = input_ids[0].tolist()
        self._see_what_became(ids)
        most = min(max_new_tokens, self._pace.candidates())
        scores = self._draft(input_ids, most, generation_config, logits_processor, attention_mask)
        self._start, self._began_s, self._rounds = len(ids), perf_counter(), self._rounds + 1
        sequences = torch.cat((input_ids, torch.tensor([self._drafted])), dim=-1)
        return SimpleNamespace(sequences=sequences, scores=tuple(scores), cache=None)

    def _see_what_became(self, ids: list[int]) -> None:
        """Tell the pace how many of the last candidates are in the text now, and how long their pass took; the first pass is that of
        the prompt, and tells nothing."""
        if self._rounds < 2:
            return
        self._pace.took(pass_s=perf_counter() - self._began_s, rows=len(self._drafted) + 1)
        kept, accepted = ids[self._start :], 0
        while accepted < min(len(self._drafted), len(kept) - 1) and kept[accepted] == self._drafted[accepted]:
            accepted += 1
        if not self._guessed:
            self._pace.saw(len(self._drafted), accepted)

    def _draft(
        self,
        input_ids: torch.Tensor,
        most: int,
        generation_config: GenerationConfig,
        logits_processor: Sequence[Process],
        mask: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """At most so many candidates into `_drafted`; their scores."""
        ids = input_ids[0].tolist()
        found = looked_up(ids, most)
        self._guessed, self._drafted = not found, found or ids[-1:]
        return [_certain(token, self._vocab) for token in self._drafted]


class ModelAssistant(Assistant):
    """Candidates that a model drafts: the one that they are for, or a small one with a cache of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        pace: Pace,
        drafting: Callable[[], AbstractContextManager[None]],
        cache: Callable[[], DynamicCache | None],
        *,
        own: bool = False,
    ) -> None:
        super().__init__(model.config, pace)
        self._model, self._drafting, self._cache, self._own = model, drafting, cache, own

    @torch.no_grad()
    def _draft(
        self,
        input_ids: torch.Tensor,
        most: int,
        generation_config: GenerationConfig,
        logits_processor: Sequence[Process],
        mask: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """The cache is as long afterwards as before; one of its own holds what it has read of the text."""
        cache = self._cache()
        expected = input_ids.shape[1] - 1  # tokens that passes have read
        if cache is None or (not self._own and (self._rounds == 0 or cache.get_seq_length() != expected)):
            # The prompt has not been read yet, or this thread has begun another text in between.
            return super()._draft(input_ids, most, generation_config, logits_processor, mask)
        ends = generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        ids, length = input_ids, cache.get_seq_length()
        if self._own and length >= ids.shape[1]:
            cache.crop(ids.shape[1] - 1 - length)
        scores: list[torch.Tensor] = []
        self._drafted, self._guessed = [], False
        with self._drafting():
            for _ in range(most):
                start_s, new = perf_counter(), ids[:, cache.get_seq_length() :]
                logits = self._model(
                    input_ids=new, cache=cache, use_cache=True, **self._placed(ids, new.shape[1], mask)
                ).logits[:, -1]
                logits = logits.float()
                for process in logits_processor:
                    logits = process(ids, logits)
                if generation_config.do_sample:
                    token = torch.multinomial(logits.softmax(-1), 1)
                else:
                    token = logits.argmax(-1, keepdim=True)
                scores.append(logits)
                self._drafted.append(int(token))
                ids = torch.cat((ids, token), dim=-1)
                if new.shape[1] == 1:
                    self._pace.took(draft_s=perf_counter() - start_s)
                if self._drafted[-1] in ends:
                    break
        if not self._own:
            cache.crop(length - cache.get_seq_length())
        return scores

    def _placed(self, ids: torch.Tensor, new_tokens: int, mask: torch.Tensor | None) -> dict[str, Any]:
        """Arguments of a pass over the last `new_tokens` of ids [1, tokens]; mask: of the prompt, where it is padded."""
        model: Any = self._model
        told: dict[str, Any] = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        if mask is not None:
            told["attention_mask"] = whole = torch.cat(
                (mask, mask.new_ones(1, ids.shape[1] - mask.shape[1])), dim=-1
            )
            if "position_ids" in inspect.signature(model.forward).parameters:
                told["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)[:, -new_tokens:]
        return told


def _certain(token: int, vocab: int) -> torch.Tensor:
    """Scores [1, vocab] of a draft that would choose nothing else."""
    scores = torch.full((1, vocab), float("-inf"))
    scores[0, token] = 0.0
    return scores
