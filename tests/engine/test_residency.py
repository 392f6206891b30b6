"""Adapters on their way between disk, host and device."""

import pytest
import torch

from loraplex_adapters.format import AdapterWeights
from loraplex_server.engine.adapter_image import build_image
from loraplex_server.engine.residency import AdapterLoadError, AdapterResidency, Limits
from tests.engine.support import BASE, random_weights, settle, small_residency

EVERYWHERE = {(layer, linear): 4 for layer in range(2) for linear in BASE.linears}


def bring(residency: AdapterResidency, digest: str) -> int:
    assert residency.acquire(digest) is None
    settle(residency)
    slot = residency.acquire(digest)
    assert slot is not None
    return slot


@pytest.mark.parametrize("rank_major", [False, True])
def test_an_image_holds_every_factor_with_its_scaling_folded_in(rank_major: bool) -> None:
    ranks = {(0, "q_proj"): 3, (0, "v_proj"): 9, (1, "down_proj"): 256, (1, "up_proj"): 1}
    weights = random_weights(ranks, scaling=0.25)
    image = build_image(weights, BASE, torch.float32, pinned=False, rank_major=rank_major)
    deltas = image.layout.deltas(image.data)
    assert set(deltas) == {(0, "qkv"), (1, "down"), (1, "gate_up")}
    columns = {"q_proj": (0, 16), "v_proj": (24, 32), "down_proj": (0, 16), "up_proj": (32, 64)}
    for (layer, linear), factors in weights.factors.items():
        group = {"q_proj": "qkv", "v_proj": "qkv", "down_proj": "down", "up_proj": "gate_up"}[linear]
        delta = deltas[layer, group]
        part = next(p for p in delta.parts if (p.col_start, p.col_stop) == columns[linear])
        got = part.b @ delta.a[part.rank_start : part.rank_stop]
        torch.testing.assert_close(got, factors.b @ factors.a * 0.25)
        assert part.rank_stop - part.rank_start == -(-factors.rank // 8) * 8


def test_an_adapter_is_copied_once_and_shared() -> None:
    opened: list[str] = []
    weights = random_weights(EVERYWHERE)

    def open_adapter(digest: str) -> AdapterWeights:
        opened.append(digest)
        return weights

    residency = AdapterResidency(
        open_adapter=open_adapter,
        base=BASE,
        limits=Limits(1 << 20, 1 << 20),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    slot = bring(residency, "a")
    assert residency.acquire("a") == slot
    assert opened == ["a"]
    delta = residency.delta(slot, 1, "o")
    assert delta is not None
    factors = weights.factors[1, "o_proj"]
    torch.testing.assert_close(delta.parts[0].b @ delta.a, factors.b @ factors.a * factors.scaling)
    residency.close()


def test_the_least_recently_used_adapter_makes_room_and_comes_back_from_the_host() -> None:
    weights = {name: random_weights(EVERYWHERE, seed) for seed, name in enumerate("abc")}
    image = build_image(weights["a"], BASE, torch.float32, pinned=False)
    residency = small_residency(weights, device_bytes=int(image.num_bytes * 2.5))
    for name in "abc":
        bring(residency, name)
        residency.release(name)
    assert [residency.where(name)[0] for name in "abc"] == ["host", "gpu", "gpu"]
    bring(residency, "a")
    residency.release("a")
    assert [residency.where(name)[0] for name in "abc"] == ["gpu", "host", "gpu"]
    residency.close()


def test_adapters_in_use_or_pinned_are_not_evicted() -> None:
    weights = {name: random_weights(EVERYWHERE, seed) for seed, name in enumerate("abc")}
    image = build_image(weights["a"], BASE, torch.float32, pinned=False)
    residency = small_residency(weights, device_bytes=int(image.num_bytes * 2.5))
    bring(residency, "a")
    residency.pin("b", True)
    bring(residency, "b")
    residency.release("b")
    assert residency.acquire("c") is None
    settle(residency)
    assert residency.acquire("c") is None
    assert residency.where("b") == ("gpu", image.num_bytes, True)
    residency.release("a")
    settle(residency)
    assert residency.acquire("c") is not None
    assert residency.where("a")[0] == "host"
    residency.close()


def test_holes_are_closed_when_a_larger_adapter_needs_them_together() -> None:
    ranks = {"small": 8, "large": 16}
    weights = {f"s{i}": random_weights({(0, "o_proj"): ranks["small"]}, i) for i in range(4)}
    weights["large"] = random_weights({(0, "o_proj"): ranks["large"]}, 9)
    one = build_image(weights["s0"], BASE, torch.float32, pinned=False).num_bytes
    residency = small_residency(weights, device_bytes=4 * one)
    slots = {name: bring(residency, name) for name in ("s0", "s1", "s2", "s3")}
    residency.release("s0")
    residency.release("s2")
    bring(residency, "large")
    for name in ("s1", "s3"):
        delta = residency.delta(slots[name], 0, "o")
        assert delta is not None
        factors = weights[name].factors[0, "o_proj"]
        torch.testing.assert_close(delta.parts[0].b @ delta.a, factors.b @ factors.a * factors.scaling)
    residency.close()


def test_a_failed_load_is_told_once_and_the_next_try_starts_afresh() -> None:
    weights: dict[str, AdapterWeights] = {}
    residency = small_residency(weights)
    assert residency.acquire("gone") is None
    settle(residency)
    with pytest.raises(AdapterLoadError, match="gone"):
        residency.acquire("gone")
    assert not residency.is_known("gone")
    weights["gone"] = random_weights(EVERYWHERE)
    assert bring(residency, "gone") == 0
    residency.close()


def test_an_adapter_larger_than_the_whole_pool_is_refused_with_the_way_out() -> None:
    residency = small_residency({"big": random_weights({(0, "o_proj"): 4096})}, device_bytes=1 << 16)
    assert residency.acquire("big") is None
    settle(residency)
    with pytest.raises(AdapterLoadError, match="--adapter-memory"):
        residency.acquire("big")
    residency.close()


def test_drop_waits_for_users_and_gives_everything_back() -> None:
    residency = small_residency({"a": random_weights(EVERYWHERE)})
    bring(residency, "a")
    assert residency.drop("a") is None
    residency.release("a")
    freed = residency.drop("a")
    assert freed is not None
    assert freed > 0
    assert (residency.bytes_used, residency.host_bytes_used, residency.is_known("a")) == (0, 0, False)
    assert residency.drop("a") == 0
    residency.close()


def test_the_host_tier_keeps_its_budget() -> None:
    weights = {f"a{i}": random_weights(EVERYWHERE, i) for i in range(6)}
    one = build_image(weights["a0"], BASE, torch.float32, pinned=False).num_bytes
    residency = AdapterResidency(
        open_adapter=lambda digest: weights[digest],
        base=BASE,
        limits=Limits(int(one * 1.5), one * 3),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for name in weights:
        bring(residency, name)
        residency.release(name)
    assert residency.host_bytes_used <= 3 * one
    assert residency.where("a5")[0] == "gpu"
    assert residency.where("a0")[0] == "disk"
    residency.close()


def test_an_adapter_that_has_landed_stays_until_those_who_waited_were_served() -> None:
    weights = {name: random_weights(EVERYWHERE, seed) for seed, name in enumerate("ab")}
    image = build_image(weights["a"], BASE, torch.float32, pinned=False)
    residency = small_residency(weights, device_bytes=int(image.num_bytes * 1.5))
    # There is room for one of two; the other must not push it out before it was used.
    assert residency.acquire("a") is None
    assert residency.acquire("b") is None
    settle(residency)
    (first,) = (name for name in "ab" if residency.is_resident(name))
    assert residency.acquire(first) is not None
    residency.expose()
    second = "b" if first == "a" else "a"
    assert residency.acquire(second) is None
    residency.release(first)
    settle(residency)
    assert residency.acquire(second) is not None
    residency.close()


def sized(**ranks: int) -> dict[str, AdapterWeights]:
    """Adapters of so many ranks; one rank takes 128 bytes."""
    return {name: random_weights({(0, "o_proj"): rank}, seed) for seed, (name, rank) in enumerate(ranks.items())}


def fill(residency: AdapterResidency, names: str) -> None:
    for name in names:
        bring(residency, name)
        residency.release(name)


def residents(residency: AdapterResidency, names: str) -> str:
    return "".join(name for name in names if residency.is_resident(name))


def test_no_adapter_is_evicted_that_the_newcomer_does_not_need() -> None:
    residency = small_residency(sized(a=8, b=8, c=64, d=48), device_bytes=80 * 128)
    fill(residency, "abc")
    # The two used longest ago are not enough; once c goes, they need not.
    fill(residency, "d")
    assert residents(residency, "abcd") == "abd"
    residency.close()


def test_nobody_is_evicted_for_an_adapter_that_finds_no_room_anyway() -> None:
    residency = small_residency(sized(a=16, b=48, c=32), device_bytes=64 * 128)
    fill(residency, "a")
    bring(residency, "b")
    assert residency.acquire("c") is None
    settle(residency)
    assert residents(residency, "abc") == "ab"
    residency.release("b")
    settle(residency)
    assert residents(residency, "abc") == "ac"
    residency.close()


def test_those_that_requests_wait_for_go_only_for_one_that_has_waited_too_long() -> None:
    residency = small_residency(sized(a=64, b=64), device_bytes=64 * 128)
    residency.expect("a")
    residency.expect("b")
    settle(residency)
    residency.expose()
    settle(residency)
    assert residents(residency, "ab") == "a"
    assert residency.lacks_room("b")
    assert residency.acquire("b", urgent=True) is None
    settle(residency)
    assert residents(residency, "ab") == "b"
    residency.close()


def test_who_gave_up_waiting_keeps_no_room() -> None:
    residency = small_residency(sized(a=64, b=64), device_bytes=64 * 128)
    for name in "ab":
        residency.expect(name)
    settle(residency)
    residency.expose()
    residency.dismiss("a")
    settle(residency)
    assert residents(residency, "ab") == "b"
    residency.close()


def test_the_first_asked_for_come_first_and_only_a_few_at_a_time() -> None:
    names = [f"a{i}" for i in range(40)]
    opened: list[str] = []
    weights = sized(**dict.fromkeys(names, 8))

    def open_adapter(digest: str) -> AdapterWeights:
        opened.append(digest)
        return weights[digest]

    residency = AdapterResidency(
        open_adapter=open_adapter,
        base=BASE,
        limits=Limits(1 << 20, 1 << 20),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for name in names:
        residency.expect(name)
    assert residency.num_copies_running < 20
    settle(residency)
    assert opened == names
    assert all(residency.is_resident(name) for name in names)
    residency.close()


def test_nothing_is_kept_of_an_adapter_that_failed_once_those_who_waited_were_told() -> None:
    residency = small_residency({})
    residency.expect("gone")
    settle(residency)
    with pytest.raises(AdapterLoadError):
        residency.acquire("gone")
    residency.dismiss("gone")
    assert not residency.is_known("gone")
    residency.close()
