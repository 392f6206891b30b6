"""Plans: lengths, mixes, arrivals, and what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from loraplex_client.load import Lengths, LoadPlan, Mix, percentile

URL = "http://127.0.0.1:1"


def test_lengths_stay_within_what_they_say() -> None:
    rng = random.Random(0)
    assert {Lengths("7").draw(rng) for _ in range(9)} == {7}
    drawn = [Lengths("uniform:3:6").draw(rng) for _ in range(200)]
    assert set(drawn) == {3, 4, 5, 6}
    drawn = sorted(Lengths("lognormal:100:0.5").draw(rng) for _ in range(2000))
    assert 90 < drawn[1000] < 110
    assert drawn[-1] <= Lengths("lognormal:100:0.5").longest == 800


@pytest.mark.parametrize("text", ["", "0", "-1", "uniform:9:3", "uniform:3", "lognormal:10", "normal:1:2", "1.5"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no length"):
        Lengths(text)


def models_of(mix: str, num_requests: int = 3000) -> Counter[str]:
    plan = LoadPlan(URL, ("a", "b", "c", "d"), concurrency=1, num_requests=1, mix=Mix(mix))
    return Counter(plan.request(i).model for i in range(num_requests))


def test_mixes() -> None:
    assert models_of("one") == {"a": 3000}
    assert models_of("distinct") == {"a": 750, "b": 750, "c": 750, "d": 750}
    assert all(600 < number < 900 for number in models_of("uniform").values())
    zipf = models_of("zipf:1")
    assert zipf["a"] / zipf["b"] == pytest.approx(2, rel=0.2)
    assert zipf["a"] / zipf["d"] == pytest.approx(4, rel=0.25)


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="no mix"):
        Mix("zipf")


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    plan = LoadPlan(URL, ("a",), rate=100, duration_s=60, burstiness=burstiness)
    times = [at for _, at in plan.arrivals()]
    assert times == sorted(times)
    assert len(times) == pytest.approx(6000, rel=0.1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.2)  # a gamma's


def test_requests_say_what_was_planned() -> None:
    plan = LoadPlan(URL, ("a",), concurrency=1, num_requests=1, prompt_tokens=Lengths("5"), output_tokens=Lengths("9"))
    body = json.loads(plan.request(0).body)
    assert len(body["messages"][0]["content"].split()) == 5
    assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (9, True, True)
    assert plan.request(3).body == plan.request(3).body != plan.request(4).body


def test_prompts_of_completions_may_be_ids() -> None:
    plan = LoadPlan(URL, ("a",), concurrency=1, num_requests=1, endpoint="completions", vocab_size=10)
    ids = json.loads(plan.request(0).body)["prompt"]
    assert len(ids) == 128
    assert set(ids) <= set(range(10))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_requests": 1}, "either a concurrency"),
        ({"num_requests": 1, "concurrency": 1, "rate": 1.0}, "either a concurrency"),
        ({"concurrency": 1}, "number of requests or a duration"),
        ({"concurrency": 0, "num_requests": 1}, "above zero"),
        ({"concurrency": 1, "num_requests": 1, "models": ()}, "no model"),
        ({"concurrency": 1, "num_requests": 1, "url": "localhost:8000"}, "no address"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadPlan(**({"url": URL, "models": ("a",)} | given))


def test_percentiles_lie_between_the_two_values_next_to_them() -> None:
    assert [percentile([1, 2, 3, 4, 5], q) for q in (0, 50, 90, 100)] == [1, 3, pytest.approx(4.6), 5]
    assert percentile([7], 99) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
