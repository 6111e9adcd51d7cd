"""What a cell decodes where several tokens come out of a pass: three kinds of text, or a replayed
pattern of acceptance.

How many candidates a pass accepts depends on the text and on the model, so it cannot be seen on
random weights. Real text is made by the real model (SmolLM2), of three kinds: a given text with
changes, code, free talk. The shapes of larger models get the pattern that was seen there
(`Replay`): their weights are multiplied and their bytes read as ever, and only the choice of tokens
is not theirs. Records of such cells carry the pattern as `workload.replayed`.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

PERIOD = 24  # tokens after which a replayed text comes again
PASSAGE = (
    "The lighthouse on the northern cape was built in 1871 from grey granite. Its lamp burned oil "
    "until 1922, when the keeper, Anna Holm, had it changed to electric light. On clear nights it "
    "can be seen from thirty kilometres away. The keeper's house beside it is now a small museum "
    "with tools, letters and a model of the first lamp. Visitors come by boat in summer; in "
    "winter the cape is closed because of storms."
)
CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    "
    "return total / len(values)\n\n"
    "def spread(values):\n    centre = mean(values)\n    total = 0\n    for value in values:\n     "
    "   total += (value - centre) ** 2\n"
    "    return total / len(values)\n"
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "edit": (
        f"Repeat the following text word by word, but call the lighthouse a tower:\n\n{PASSAGE}",
        f"Summarise the following text, keeping its sentences where you can:\n\n{PASSAGE}",
    ),
    "code": (
        f"Add a docstring to each of these Python functions:\n\n{CODE}",
        "Write a Python function that reads a CSV file and returns the rows as dictionaries.",
    ),
    "chat": (
        "Explain to a child why the sky is blue.",
        "Tell me a short story about a fox and a clockmaker.",
    ),
}


class Watch:
    """A streamer that keeps when tokens came, and how many bytes had been read and candidates
    verified by then.
    """

    def __init__(self, bytes_read: Callable[[], int], drafted: Callable[[], int]) -> None:
        self._bytes_read, self._drafted = bytes_read, drafted
        self.passes: list[tuple[float, int, list[int]]] = []  # the prompt first
        self.drafted: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.passes.append((time.perf_counter(), self._bytes_read(), value.flatten().tolist()))
        self.drafted.append(self._drafted())

    def end(self) -> None: ...


class Margins(LogitsProcessor):
    """By how much the likeliest token leads at each position: where two kernels may see a near tie
    otherwise. Changes nothing.
    """

    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, second = scores[0].topk(2).values.tolist()
        self.of[input_ids.shape[1]] = round(first - second, 4)
        return scores


class Replay(LogitsProcessor):
    """Has the draft and the model disagree where they did in another run, whatever their weights.

    But for that the text comes again every PERIOD tokens, so that prompt lookup finds candidates
    too.

    runs: how many tokens in a row the draft said as the model did, before each that it did not;
    from the beginning again at the end.
    """

    def __init__(self, runs: Sequence[int], drafting: Callable[[], bool]) -> None:
        self._runs, self._drafting = runs, drafting
        self._first: int | None = None

    def disagree(self, position: int) -> bool:
        """Whether the draft is wrong about token number `position` of the answer."""
        position %= sum(self._runs) + len(self._runs)
        for run in self._runs:
            if position <= run:
                return position == run
            position -= run + 1
        return False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1]
        self._first = position if self._first is None else min(self._first, position)
        token = 300 + position % PERIOD * 7919 % (scores.shape[1] // 2)
        if not self._drafting() and self.disagree(position - self._first):
            token += 1
        forced = torch.full_like(scores, -1e4)
        forced[0, token] = 0.0
        return forced


def decode(
    model: PreTrainedModel,
    job: dict[str, Any],
    emit: Callable[..., None],
    bytes_read: Callable[[], int],
) -> dict[str, Any]:
    """Greedily continue each text of the workload; an event a pass.

    Returns what each kind came to.
    """
    engine: Any = model.flexinfer
    found: dict[str, Any] = {}
    prompts = [(kind, text) for kind in job["texts"] for text in PROMPTS[kind]]
    for kind, text in prompts or [("replayed", "")]:
        if job["replayed"]:
            ids = torch.tensor([job["prompt_ids"]])
            margins: Any = Replay(job["replayed"], lambda: engine.store.drafting)
        else:
            message = [{"role": "user", "content": text}]
            ids = engine.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            margins = Margins()
        watch, before = Watch(bytes_read, lambda: engine.stats().get("drafted", 0)), engine.stats()
        output: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["max_tokens"],
            max_time=job["max_seconds"],
            do_sample=False,
            pad_token_id=0,
            streamer=watch,
            logits_processor=LogitsProcessorList([margins]),
            **({"eos_token_id": None} if job["replayed"] else {}),
        )
        for (start_s, start_bytes, _), (stop_s, stop_bytes, tokens) in itertools.pairwise(
            watch.passes[1:]
        ):
            nbytes = stop_bytes - start_bytes
            emit("token", ids=tokens, s=stop_s - start_s, bytes=nbytes, counted=True)
        answer = output[0, ids.shape[1] :].tolist()
        one = _summary(watch, before, engine.stats(), ids.shape[1], answer)
        if isinstance(margins, Margins):
            one["margins"] = [margins.of.get(ids.shape[1] + i) for i in range(len(answer))]
        found.setdefault(kind, []).append(one)
    return json.loads(json.dumps(found))


def _summary(
    watch: Watch,
    before: dict[str, Any],
    after: dict[str, Any],
    prompt_tokens: int,
    answer: list[int],
) -> dict[str, Any]:
    """What one text came to, from the engine's counters before and after it."""
    times = watch.passes
    counts = [len(tokens) for _, _, tokens in times[2:]]
    kept = ("drafted", "accepted", "draft_passes", "draft_s")
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": sum(counts),
        "passes": len(counts),
        "seconds": times[-1][0] - times[1][0],
        "first_token_s": times[1][0] - times[0][0],
        "tokens_of_passes": counts,
        "candidates_of_passes": [new - old for old, new in itertools.pairwise(watch.drafted[1:])],
        "answer": answer,
        "margins": [],
        "predicted_tokens_per_s": after.get("draft_predicted_tokens_per_s"),
        "acceptance": after.get("acceptance"),
    } | {name: after[name] - before[name] for name in kept if name in after}
