"""Who drafts candidates, and how they reach transformers: as the `assistant_model` of its
`generate()`.

transformers' assisted generation keeps of the candidates those that the model would have chosen
itself (greedy), or accepts and redraws them so that the distribution is the model's own (sampling;
Leviathan et al., arXiv 2211.17192, algorithm 1). Nothing of that verification is here: `Assistant`
has the few attributes of a model that generation asks of one, and hands candidates in.

The model itself drafts with the KV cache of the text, cropped afterwards: the passes that verify
write true keys and values over those of its candidates. A small model keeps a cache of its own.
transformers wants at least one candidate of every assistant: where nothing in the text is found,
the last token once more.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel

from flexinfer.draft.economics import Pace, looked_up

# Of transformers: ids and scores to scores.
Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Assistant:
    """Candidates of one text that stand in it already, as `assistant_model` of transformers'
    `generate()`.

    Of a model it has what assisted generation asks for (transformers 5.24): `config`,
    `generation_config`, `device`, `generate`.
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
        # Position of the first candidate in the text.
        self._start = 0
        # When the pass that verifies them began.
        self._began_s = 0.0
        self._rounds = 0
        # Whether they are fillers, which say nothing about acceptance.
        self._guessed = False

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
        """At least one candidate after input_ids [1, tokens], and the scores [1, vocab] that each
        was drawn from.
        """
        ids = input_ids[0].tolist()
        self._see_what_became(ids)
        most = min(max_new_tokens, self._pace.candidates())
        scores = self._draft(input_ids, most, generation_config, logits_processor, attention_mask)
        self._start, self._began_s, self._rounds = len(ids), perf_counter(), self._rounds + 1
        sequences = torch.cat((input_ids, torch.tensor([self._drafted])), dim=-1)
        return SimpleNamespace(sequences=sequences, scores=tuple(scores), cache=None)

    def _see_what_became(self, ids: list[int]) -> None:
        """Tell the pace how many of the last candidates are in the text now, and how long their
        pass took; the first pass is that of the prompt, and tells nothing.
        """
        if self._rounds < 2:
            return
        self._pace.took(pass_s=perf_counter() - self._began_s, rows=len(self._drafted) + 1)
        kept, accepted = ids[self._start :], 0
        while (
            accepted < min(len(self._drafted), len(kept) - 1)
            and kept[accepted] == self._drafted[accepted]
        ):
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
        """At most `most` candidates into `_drafted`; their scores."""
        ids = input_ids[0].tolist()
        found = looked_up(ids, most)
        self._guessed, self._drafted = not found, found or ids[-1:]
        return [_certain(token, self._vocab) for token in self._drafted]


class ModelAssistant(Assistant):
    """Candidates that a model drafts: the one that they are for, or a small one with a cache of its
    own.
    """

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
        """The cache is as long afterwards as before; one of its own holds what it has read of the
        text.
        """
        cache = self._cache()
        # Tokens that the passes so far have seen.
        expected = input_ids.shape[1] - 1
        if cache is None or (
            not self._own and (self._rounds == 0 or cache.get_seq_length() != expected)
        ):
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
                    input_ids=new,
                    cache=cache,
                    use_cache=True,
                    **self._placed(ids, new.shape[1], mask),
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

    def _placed(
        self, ids: torch.Tensor, new_tokens: int, mask: torch.Tensor | None
    ) -> dict[str, Any]:
        """Arguments of a pass over the last `new_tokens` of ids [1, tokens]; mask: of the prompt,
        where it is padded.
        """
        model: Any = self._model
        inputs: dict[str, Any] = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        if mask is not None:
            inputs["attention_mask"] = whole = torch.cat(
                (mask, mask.new_ones(1, ids.shape[1] - mask.shape[1])), dim=-1
            )
            if "position_ids" in inspect.signature(model.forward).parameters:
                inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)[:, -new_tokens:]
        return inputs


def _certain(token: int, vocab: int) -> torch.Tensor:
    """Scores [1, vocab] of a draft that would choose nothing else."""
    scores = torch.full((1, vocab), float("-inf"))
    scores[0, token] = 0.0
    return scores
