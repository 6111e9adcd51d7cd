"""flexinfer chat: talk to an instruction-tuned model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import TERMINATED, Interrupt, Terminated
from flexinfer.cli.parameters import Model, Verbose
from flexinfer.cli.terminal import logged, note
from flexinfer.cli.text import (
    Clock,
    Decoding,
    at_context,
    engine_of,
    find,
    loaded,
    measure,
    speed_line,
    text_streamer,
)
from flexinfer.options import Options
from flexinfer.plan.plan import Plan
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

System = Annotated[str | None, typer.Option(help="system message")]


def chat(
    model: Model,
    options: Options,
    decoding: Decoding,
    system: System = None,
    verbose: Verbose = False,
) -> int:
    """Talk to an instruction-tuned model; /exit leaves.

    Questions come from standard input, answers are streamed.
    """
    with logged(verbose), Bars() as bars:
        path = find(model, options, bars)
        if not _has_template(path):
            raise ValueError(f"{model} has no chat template; use `flexinfer generate`")
        with loaded(path, options, decoding, bars) as streamed:
            tokenizer = engine_of(streamed).tokenizer
            if sys.stdin.isatty():
                for line in plan_lines(path, engine_of(streamed).plan):
                    note(line)
            _converse(Conversation(streamed, tokenizer, decoding, bars, system))
    return 0


def _has_template(path: Path) -> bool:
    """Whether the model has a chat template, before it is loaded.

    Raises CheckpointError where it has no tokenizer.
    """
    from flexinfer.formats.checkpoint import open_checkpoint
    from flexinfer.formats.tokenizer import prepare_tokenizer

    return prepare_tokenizer(open_checkpoint(path).config_dir).has_template


def plan_lines(path: Path, plan: Plan) -> tuple[str, str]:
    """What a conversation will be like: where the weights are, and how fast it is."""
    weights = f"{path.name}: {format_size(plan.total_bytes)} of weights a token"
    if plan.streamed_bytes:
        stay = (
            f"{format_size(plan.total_bytes - plan.streamed_bytes)} stay in memory, "
            f"{format_size(plan.streamed_bytes)} are read"
        )
    else:
        stay = "all of them in memory"
    if plan.draft is not None:
        speed = (
            f"{plan.draft.predicted_tokens_per_s:.2g} tokens/s, {plan.draft.tokens_per_pass:.2g} a "
            "pass by the draft"
        )
    else:
        speed = (
            f"{plan.predicted_tokens_per_s:.2g} tokens/s, at most {plan.bound_tokens_per_s:.2g} in "
            "this budget"
        )
    return (
        f"{weights}, {stay}; budget {format_size(plan.budget_bytes)}",
        f"about {speed}; context {plan.overheads.context_tokens} tokens",
    )


def _converse(talk: "Conversation") -> None:
    """Ask what standard input has to ask."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  (gives input() history and editing)

        note("/exit or Ctrl-D leaves, Ctrl-C stops an answer")
    try:
        while True:
            try:
                question = input("> " if at_terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                note("\n/exit or Ctrl-D leaves")
                continue
            if question == "/exit":
                return
            if question:
                talk.ask(question)
    except Terminated:
        if at_terminal:
            print()
        raise
    if at_terminal:
        print()


class Conversation:
    """The turns so far, and a KV cache that holds what the model has read of them."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        decoding: Decoding,
        bars: Bars,
        system: str | None = None,
    ) -> None:
        # transformers' own types promise too little of both.
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._decoding, self._bars = decoding, bars
        self._context = engine_of(model).context
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        # Tokens whose keys and values are in the cache.
        self._cached: list[int] = []
        self._cache: Any = None

    def ask(self, question: str) -> str:
        """Stream the answer to `question`; both join the history. Returns the answer, as far as it
        went.

        Raises Terminated after the token in hand when SIGTERM comes.
        """
        import torch

        self.turns.append({"role": "user", "content": question})
        prompt = self._fit_prompt()
        if prompt is None:
            self.turns.pop()
            note(
                f"this question does not fit into a context of {self._context} tokens and is "
                "forgotten; start with a larger --context"
            )
            return ""
        self._keep_common(prompt)
        streamer = text_streamer(self._tokenizer)
        clock = Clock(streamer, engine_of(self._model), self._bars)
        room = self._context - len(prompt)
        options = self._decoding.keywords(room)
        with Interrupt(self._bars.stopping) as interrupt:
            try:
                ids = torch.tensor([prompt])
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    cache=self._cache,
                    streamer=clock,
                    stopping_criteria=[interrupt],
                    **options,
                )[0].tolist()
            # In the middle of a pass: the layers of the cache no longer agree.
            except KeyboardInterrupt:
                self._cache, self._cached = None, []
                self._bars.stop()
                self.turns.pop()
                note("\nstopped at once; this question is forgotten")
                return ""
        self._cached = output[: self._cache.get_seq_length()]
        answer: str = self._tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": answer})
        if room < self._decoding.new_tokens and len(output) - len(prompt) >= room:
            note(at_context(self._context))
        note(("stopped; " if interrupt.pressed else "") + speed_line(measure(self._model, clock)))
        if interrupt.code == TERMINATED:
            raise Terminated
        return answer

    def _fit_prompt(self) -> list[int] | None:
        """The token ids of the history, its oldest turns dropped where there is no room; None, and
        nothing dropped, when the last turn alone is too long.
        """
        least_answer = min(16, self._decoding.new_tokens)
        for dropped in range(0, len(self.turns), 2):
            encoded = self._tokenizer.apply_chat_template(
                self._system + self.turns[dropped:], add_generation_prompt=True, return_dict=True
            )
            prompt: list[int] = list(encoded["input_ids"])
            if len(prompt) + least_answer <= self._context:
                if dropped:
                    del self.turns[:dropped]
                    note(
                        f"the oldest {dropped} turns no longer fit into the context and are "
                        "forgotten"
                    )
                return prompt
        return None

    def _keep_common(self, prompt: list[int]) -> None:
        """Make the cache hold exactly the beginning that it has in common with `prompt`, less at
        least one token.
        """
        common = 0
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        try:
            if self._cache is not None and len(self._cached) > common:
                self._cache.crop(common - len(self._cached))
        # A sliding window has let go of what would be needed; states cannot go back.
        except (ValueError, RuntimeError):
            self._cache = None
        if self._cache is None or common == 0:
            from transformers import DynamicCache

            # First: the engine lends its memory to one living cache.
            self._cache = None
            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
