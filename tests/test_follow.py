"""A budget that follows what the machine has to spare: gives way at once, comes back slowly, and
does not swing.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_budget import make_big

from experiments.cgroups import find_place
from experiments.limits import Limits
from flexinfer.memory.follow import CALM_POLLS, HYSTERESIS, Follower, next_budget
from tests.conftest import Load, MakeCheckpoint, logits, prompt, stock

MIB = 1 << 20


@given(*(st.integers(1, 1 << 40) for _ in range(4)), st.integers(0, 10))
def test_the_next_budget_lies_between_the_smallest_and_the_largest(
    budget: int, spare: int, smallest: int, more: int, calm: int
) -> None:
    largest = smallest + more
    budget = min(max(budget, smallest), largest)
    after = next_budget(budget, spare, smallest, largest, calm)
    assert smallest <= after <= largest
    assert after == budget or abs(after - budget) > HYSTERESIS * budget * 0.99


def test_it_shrinks_at_once_and_grows_after_a_while() -> None:
    assert next_budget(1000, 500, 100, 2000, 0) == 500
    assert next_budget(1000, 1500, 100, 2000, CALM_POLLS - 1) == 1000
    assert next_budget(1000, 1500, 100, 2000, CALM_POLLS) == 1500
    assert next_budget(1000, 5000, 100, 2000, CALM_POLLS) == 2000
    assert next_budget(1000, 10, 100, 2000, 0) == 100
    assert next_budget(1000, 990, 100, 2000, CALM_POLLS) == 1000


def test_a_follower_resizes_as_memory_comes_and_goes_and_ends() -> None:
    state = {"budget": 1000, "spare": 1000}
    before = threading.active_count()
    follower = Follower(
        lambda nbytes: state.update(budget=nbytes),
        budget=lambda: state["budget"],
        smallest=lambda: 100,
        spare=lambda: state["spare"],
        largest_bytes=1000,
    )
    try:
        state["spare"] = 400
        follower.look()
        assert state["budget"] == 400
        state["spare"] = 3000
        looks = 0
        while state["budget"] == 400:
            follower.look()
            looks += 1
        assert state["budget"] == 1000
        assert 1 <= looks <= CALM_POLLS
    finally:
        follower.close()
    follower.close()
    assert threading.active_count() == before


def test_closing_the_model_ends_the_thread(checkpoint: MakeCheckpoint, load: Load) -> None:
    before = threading.active_count()
    model = load(checkpoint(), follow=True)
    assert "flexinfer-memory" in {thread.name for thread in threading.enumerate()}
    assert logits(model, prompt()).equal(logits(stock(checkpoint()), prompt()))
    model.flexinfer.close()
    assert threading.active_count() == before


RUN = """
import json, subprocess, sys, time
path = sys.argv[1]
HOG = '''
import sys, time
held = []
for _ in range(30):
    held.append(bytearray(b"x") * (10 << 20))
    time.sleep(0.25)
sys.stdin.read()
'''
import torch, flexinfer
model = flexinfer.from_pretrained(path, "auto", context=64, follow=True)
ids = torch.randint(3, 16_000, (1, 4), generator=torch.Generator().manual_seed(0))
seen, texts = [], []

def go_on(until, limit_s=60):
    start_s = time.monotonic()
    while not until() and time.monotonic() < start_s + limit_s:
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                              do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(text.tolist())
        seen.append(model.flexinfer.plan.budget_bytes)

go_on(lambda: len(texts) >= 2)
first = seen[-1]
hog = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE)
go_on(lambda: seen[-1] < first - (150 << 20))
least = seen[-1]
hog.communicate(b"")
go_on(lambda: seen[-1] > first - (40 << 20))
same = all(t == texts[0] for t in texts)
print(json.dumps({"first": first, "least": least, "last": seen[-1], "same": same,
                  "hog": hog.returncode}))
"""


def test_in_a_group_where_another_process_comes_and_goes(tmp_path: Path) -> None:
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    with Limits(memory_bytes=750 * MIB) as limits:
        command = limits.command([sys.executable, "-c", RUN, str(make_big())])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        usage = limits.usage()
    assert done.returncode == 0, (done.returncode, usage, done.stderr[-2000:])
    report = json.loads(done.stdout.splitlines()[-1])
    assert usage.oom_kills == 0
    assert report["same"]
    assert report["hog"] == 0
    assert report["least"] <= report["first"] - 150 * MIB
    assert report["last"] >= report["first"] - 40 * MIB
