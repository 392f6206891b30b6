"""What is reported of adapters."""

from loraplex_server.engine.adapter_states import AdapterStates
from loraplex_server.engine.messages import AdapterState
from tests.engine.support import random_weights, settle, small_residency

WEIGHTS = {name: random_weights({(0, "o_proj"): 8}, seed) for seed, name in enumerate("abc")}


def test_states_follow_adapters_and_their_requests() -> None:
    residency = small_residency(WEIGHTS)
    states = AdapterStates()
    assert states.now(residency, {}) == {}
    residency.prefetch("a")
    residency.prefetch("b")
    residency.pin("b", True)
    settle(residency)
    size = 8 * (16 + 16) * 4
    before = states.now(residency, {"a": (1, 2), "c": (0, 1)})
    assert before == {
        "a": AdapterState("gpu", size, 1, 2),
        "b": AdapterState("gpu", size, pinned=True),
        "c": AdapterState("disk", 0, 0, 1),
    }
    residency.expose()
    assert residency.drop("b") is not None
    after = states.now(residency, {"a": (1, 2)})
    assert after == {"a": AdapterState("gpu", size, 1, 2)}
    assert after["a"] is before["a"]
    assert states.now(residency, {}) == {"a": AdapterState("gpu", size)}
    assert set(before) == {"a", "b", "c"}
    residency.close()


def test_with_thousands_known_only_what_changed_is_looked_at() -> None:
    residency = small_residency(WEIGHTS)
    asked: list[str] = []
    where = residency.where

    def watched(digest: str) -> tuple[str, int, bool]:
        asked.append(digest)
        return where(digest)

    residency.where = watched  # type: ignore[method-assign, assignment]
    states = AdapterStates()
    for i in range(3000):
        residency.pin(str(i), True)
    assert len(states.now(residency, {})) == 3000
    asked.clear()
    residency.pin("7", False)
    residency.pin("8", True)
    assert len(states.now(residency, {"9": (1, 0)})) == 2999
    assert sorted(asked) == ["8", "9"]
    residency.close()
