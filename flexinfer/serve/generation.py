"""Generation for the server: transformers' own manager, with a watch on each request.

One request at a time generates (flexinfer.serve.gate gives the turns), on one thread that keeps all
that torch holds for a thread; the model is loaded on it too, so that what is measured then is what
is there later. A `Turn` is what the gate sees of it: a clock, counts, and a way to end the text
after the pass in hand once nobody wants it any more. `Text` watches the tokens, of which a pass
gives several with a draft.

Stop strings are looked for here: transformers' StopStringCriteria makes a table of the vocabulary
times the length of the strings, 100 MB for 256,000 tokens and 100 characters, and keeps eight of
them; it looks once a pass, so that a draft's tokens would go past the string. The same token ends
the text; the string is left out of it, as OpenAI does.
"""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import (
    GenerationState,
    _StreamError,
    get_response_template,
    response_events_to_chunks,
)

from flexinfer.messages import cause
from flexinfer.serve.fields import Refusal
from flexinfer.serve.requests import Limits

# What transformers' parser raises of a call of a tool that is none: no JSON, no name, cut off by
# the end of the text.
NO_CALL = (ValueError, RuntimeError, KeyError, TypeError)
# Length of an answer if the request sets none, as in transformers' server.
NEW_TOKENS = 1024
logger = logging.getLogger("flexinfer.serve")


@dataclass(slots=True)
class Turn:
    """What one request makes of its turn."""

    loop: asyncio.AbstractEventLoop
    prompt_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    # Whether it was handed to the thread.
    begun: bool = False
    failure: str | None = None
    start_s: float = field(default_factory=perf_counter)
    # When the first pass ended, and the tokens that it gave.
    first_s: float = 0.0
    first_tokens: int = 0
    last_s: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End the text after the pass in hand. From any thread."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def tokens_per_s(self) -> float | None:
        """After the first pass, which waits for the prompt."""
        seconds, tokens = self.last_s - self.first_s, self.new_tokens - self.first_tokens
        return tokens / seconds if tokens and seconds else None

    def saw(self, tokens: int) -> None:
        """A pass has given this number of tokens."""
        self.last_s = perf_counter()
        self.passes += 1
        self.new_tokens += tokens
        if self.passes == 1:
            self.first_s, self.first_tokens = self.last_s, tokens

    def end(self) -> None:
        """Called by the thread when it is done."""
        self.loop.call_soon_threadsafe(self.ended.set)


class StopText:
    """A text that comes in pieces and ends before the first of `stops`: the one that is complete
    first, or of two that are at the same character the longer. What may be the beginning of one is
    held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.complete = False

    def feed(self, piece: str) -> str:
        """What is certain to be in the text, once `piece` has come."""
        text, self._held = self._held + piece, ""
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.complete = True
            return text[: min(found)[1]]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                text, self._held = text[:start], text[start:]
                break
        return text

    def rest(self) -> str:
        """What is held back, once no more comes."""
        held, self._held = self._held, ""
        return held


class Text:
    """The new tokens of one text, as a stopping criterion of transformers sees them: after each
    pass, which gives several with a draft. The text ends before a stop string, or once nobody wants
    it. To the handlers it is their streamer.
    """

    def __init__(
        self,
        turn: Turn,
        tokenizer: Any,
        stops: Sequence[str],
        *,
        keep_special: bool,
        parser: Any = None,
        emit: Callable[[Any], None] | None = None,
    ) -> None:
        """
        Args:
            turn: counts the tokens.
            tokenizer: of the tokenizers library.
            stops: strings that end the text. One that is a special token ends it as that token,
                which has no text.
            keep_special: leave special tokens in the text, for the parser.
            parser: transformers', of reasoning and of calls of tools.
            emit: takes the text piece by piece, and what the parser has found. Without it `said` is
                the text.
        """
        self._turn, self._tokenizer, self._parser, self._emit = turn, tokenizer, parser, emit
        self._decoded = DecodeStream([], skip_special_tokens=not keep_special)
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: number for number, token in added if token.special}
        self._stop_ids = {self._special[stop] for stop in stops if stop in self._special}
        self._stop = StopText(stops)
        self.said = ""
        # Text since the parser last found something.
        self._unparsed = ""
        if parser is not None:
            self._hand_on(response_events_to_chunks(parser.initial_events))

    @property
    def complete(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stop.complete

    @property
    def total_tokens(self) -> int:
        """For the usage that a handler reports."""
        return self._turn.new_tokens

    def cancel(self) -> None:
        """Called where the client of a stream goes away."""
        self._turn.stop()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[0, self._turn.prompt_tokens + self._turn.new_tokens :].tolist()
        for count, token in enumerate(new, 1):
            self._take(token)
            if self.complete:
                new = new[:count]
                break
        self._turn.saw(len(new))
        return torch.full(
            (input_ids.shape[0],), self.complete or self._turn.stopped, dtype=torch.bool
        )

    def end(self) -> None:
        """No more tokens come."""
        self._write(self._stop.rest())
        if self._parser is not None:
            try:
                self._hand_on(response_events_to_chunks(self._parser.finalize()[1]))
            except NO_CALL:
                self._hand_on([self.without_special(self._unparsed)])

    def without_special(self, text: str) -> str:
        """`text` as a client has it where no parser took the special tokens out."""
        for token in self._special:
            text = text.replace(token, "")
        return text

    def _take(self, token: int) -> None:
        if token in self._stop_ids:
            self._write(self._stop.rest())
            self._stop.complete = True
        elif piece := self._decoded.step(self._tokenizer, token):
            self._write(self._stop.feed(piece))

    def _write(self, text: str) -> None:
        if not text:
            return
        if self._emit is None:
            self.said += text
        elif self._parser is None:
            self._hand_on([self.without_special(text)])
        else:
            self._unparsed += text
            try:
                found = response_events_to_chunks(self._parser.feed(text))
            except NO_CALL:
                # It is plain text, and so is what follows.
                self._parser, found = None, [self.without_special(self._unparsed)]
            self._hand_on(found)
            if found:
                last = found[-1]
                self._unparsed = self._unparsed.rpartition(last)[2] if isinstance(last, str) else ""

    def _hand_on(self, items: Sequence[Any]) -> None:
        assert self._emit is not None
        for item in items:
            if item != "":
                self._emit(item)


class Reply:
    """Stands where a handler expects a tokenizer, once a whole text is there: it is not to be
    decoded again, for a stop string may have cut it, and what looks like a call of a tool may be
    none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = self
        self.decode, self._parse = tokenizer.decode, tokenizer.parse_response
        self.response_template = getattr(tokenizer, "response_template", None)
        self.backend = tokenizer._tokenizer
        self.text = ""
        # The text with special tokens, if a stop string ended it.
        self.cut: str | None = None

    def parse_response(self, ids: Any, template: Any, **options: Any) -> dict[str, Any]:
        """The message: content, reasoning, calls of tools."""
        try:
            parsed: dict[str, Any] = self._parse(
                ids if self.cut is None else self.cut, template, **options
            )
            for call in parsed.get("tool_calls") or ():
                call["function"]["name"], call["function"]["arguments"]
        except NO_CALL:
            return {"content": self.text}
        return parsed


class Failed(RuntimeError):
    """A generation ended with an error; what a client may read of it."""


class Generation:
    """What transformers' handlers generate with, as its GenerateManager: one thread, for the turn
    in hand. Refuses what does not fit into the context.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flexinfer-generate")
        self.turn: Turn | None = None
        self.limits: Limits | None = None

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Have the thread do something."""
        return self._executor.submit(fn, *args, **kwargs)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple["asyncio.Queue[Any]", Text]:
        """Begin a text; a queue of its pieces, None after the last.

        Raises Refusal where the prompt is too long.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        turn, stops = self._fitted(inputs, gen_config)

        def emit(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        text = Text(
            turn,
            processor._tokenizer,
            stops,
            keep_special=response_parser is not None,
            parser=response_parser,
            emit=emit,
        )

        def run() -> None:
            try:
                _generate(model.generate, turn, text, inputs, gen_config)
                emit(None)
            except Failed as failure:
                emit(_StreamError(str(failure)))

        self.submit(run)
        return queue, text

    async def generate_non_streaming(
        self, model: Any, processor: Reply, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        """A whole text, the length of its prompt, its tokens.

        Raises Refusal where the prompt is too long.
        """
        turn, stops = self._fitted(inputs, gen_config)
        keep_special = get_response_template(processor, model) is not None
        text = Text(turn, processor.backend, stops, keep_special=keep_special)
        ids = await asyncio.wrap_future(
            self.submit(_generate, model.generate, turn, text, inputs, gen_config)
        )
        if text.complete:
            processor.cut, processor.text = text.said, text.without_special(text.said)
        else:
            processor.text = processor.decode(ids, skip_special_tokens=True)
        return processor.text, turn.prompt_tokens, ids

    def _fitted(self, inputs: Any, config: Any) -> tuple[Turn, list[str]]:
        """The turn that begins now, and the strings that stop it; `config` is made to fit.

        Raises Refusal.
        """
        turn, limits = self.turn, self.limits
        assert turn is not None
        assert limits is not None
        turn.prompt_tokens = inputs["input_ids"].shape[-1]
        if not turn.prompt_tokens:
            raise Refusal(400, "the prompt is empty")
        room = limits.context - turn.prompt_tokens
        if room < 1:
            raise limits.too_long(f"the prompt has {turn.prompt_tokens}")
        config.max_new_tokens = min(config.max_new_tokens or NEW_TOKENS, room)
        stops, config.stop_strings = config.stop_strings or [], None
        turn.begun = True
        return turn, [stops] if isinstance(stops, str) else stops

    def stop(self) -> None:
        """End the thread, after what it has to do."""
        self._executor.shutdown()


def _generate(
    generate: Callable[..., torch.Tensor], turn: Turn, text: Text, inputs: Any, config: Any
) -> torch.Tensor:
    """The new tokens; on the thread.

    Raises Failed, which holds no frame and so no KV cache: there is memory for one.
    """
    sequences: torch.Tensor | None = None
    try:
        sequences = generate(**inputs, generation_config=config, stopping_criteria=[text])
        text.end()
    except Exception as failure:
        turn.failure = cause(failure)
        if not turn.stopped:
            logger.exception("a generation failed")
    finally:
        turn.end()
    if sequences is None:
        gc.collect()
        kind = str(turn.failure).partition(":")[0]
        raise Failed(f"the generation failed ({kind}); the log of the server says more")
    if text.complete:
        # Else a handler takes the last token that is allowed for the reason.
        config.max_new_tokens = None
    return sequences[0, turn.prompt_tokens : turn.prompt_tokens + turn.new_tokens]


class OneGeneration(GenerationState):
    """The state that transformers' handlers share: one manager, for one model."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._generation
