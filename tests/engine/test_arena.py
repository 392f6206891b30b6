"""The arena that adapters of any size share."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.arena import Arena, Extent


def arena(num_elements: int = 4096) -> Arena:
    return Arena(num_elements, torch.float32, torch.device("cpu"))


def test_a_hole_is_used_again() -> None:
    space = arena()
    first, second = space.allocate(1024), space.allocate(1024)
    assert first is not None
    assert second is not None
    space.free(first)
    third = space.allocate(1000)
    assert third is not None
    assert third.start == 0


def test_compaction_makes_room_and_keeps_content() -> None:
    space = arena()
    extents = [space.allocate(1024) for _ in range(4)]
    for value, extent in enumerate(extents):
        assert extent is not None
        space.view(extent).fill_(value)
    for extent in (extents[0], extents[2]):
        assert extent is not None
        space.free(extent)
    assert space.allocate(2048) is None
    moved = space.compact()
    assert moved == [extents[1], extents[3]]
    for value in (1, 3):
        extent = extents[value]
        assert extent is not None
        assert space.view(extent).eq(value).all()
    assert space.allocate(2048) is not None


@given(st.lists(st.tuples(st.integers(1, 900), st.booleans()), max_size=40))
@settings(deadline=None)
def test_extents_never_overlap_and_content_survives(moves: list[tuple[int, bool]]) -> None:
    space = arena()
    live: dict[int, Extent] = {}
    for i, (size, compact) in enumerate(moves):
        extent = space.allocate(size)
        if extent is None and live:
            space.free(live.pop(next(iter(live))))
        elif extent is not None:
            space.view(extent).fill_(i)
            live[i] = extent
        if compact:
            space.compact()
        for value, other in live.items():
            assert space.view(other).eq(value).all()
        assert space.num_used == sum(other.size for other in live.values())
