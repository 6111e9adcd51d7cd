"""flexinfer generate: go on from a prompt."""

import json
import sys
from typing import Annotated, Any, cast

import typer

from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import Interrupt
from flexinfer.cli.parameters import Json, Model, Verbose
from flexinfer.cli.terminal import logged, note
from flexinfer.cli.text import (
    Clock,
    Decoding,
    Nowhere,
    at_context,
    engine_of,
    find,
    loaded,
    measure,
    speed_line,
    text_streamer,
)
from flexinfer.options import Options

# That a tokenizer may put around a prompt; the prompt itself has at most one per byte.
SPECIAL_TOKENS = 8
Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPT]",
        help="the text to go on from (standard input if left out)",
        show_default=False,
    ),
]


def generate(
    model: Model,
    options: Options,
    decoding: Decoding,
    prompt: Prompt = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> int:
    """Go on from a prompt; the text is streamed."""
    prompt = sys.stdin.read() if prompt is None else prompt
    if not prompt:
        raise ValueError("prompt='' is empty; give some text, as an argument or on standard input")
    with logged(verbose), Bars() as bars:
        path = find(model, options, bars)
        from flexinfer.engine.prepare import ContextOf

        new_tokens = decoding.new_tokens
        context_of = ContextOf(
            least=new_tokens + 1,
            most=new_tokens + len(prompt.encode()) + SPECIAL_TOKENS,
            exact=lambda tokenizer: new_tokens + len(tokenizer(prompt)["input_ids"]),
        )
        with (
            loaded(path, options, decoding, bars, context_of) as streamed,
            Interrupt(bars.stopping) as interrupt,
        ):
            tokenizer = engine_of(streamed).tokenizer
            inputs = tokenizer(prompt, return_tensors="pt")
            prompt_tokens = inputs["input_ids"].shape[1]
            context, needed = engine_of(streamed).context, prompt_tokens + new_tokens
            least = needed if decoding.max_new_tokens is not None else prompt_tokens + 1
            if context < least:
                raise ValueError(
                    f"context={context} is too small for {prompt_tokens} prompt tokens and what is "
                    f"to follow; leave it out, or give --context {needed}"
                )
            room = context - prompt_tokens
            writer = Nowhere() if as_json else text_streamer(tokenizer)
            clock = Clock(writer, engine_of(streamed), bars)
            output = cast(Any, streamed).generate(
                **inputs, streamer=clock, stopping_criteria=[interrupt], **decoding.keywords(room)
            )
            result = measure(streamed, clock)
            token_ids = output[0, prompt_tokens:].tolist()
    if as_json:
        result |= {"token_ids": token_ids, "prompt_tokens": prompt_tokens}
        print(json.dumps({"text": tokenizer.decode(token_ids, skip_special_tokens=True)} | result))
    else:
        if room < decoding.new_tokens and len(token_ids) >= room:
            note(at_context(context))
        note(("stopped; " if interrupt.pressed else "") + speed_line(result))
        if result["draft_that_pays"] is not None:
            speed = f"{result['draft_that_pays']:.3g} tokens/s"
            note(f"--draft auto may give {speed}, with the same output")
    return interrupt.code
