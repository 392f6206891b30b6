"""The arena that adapters of any size share."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.arena import Arena
from loraplex_server.engine.extents import Extent, Opening


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
    opening = space.find(2048)
    assert opening is not None
    moved = space.make(opening)
    assert moved == [extents[1]]
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
        opening = space.find(space.num_free) if compact and space.num_free else None
        if opening is not None:
            space.make(opening)
            found = space.find(space.num_free)
            assert found is not None
            assert found.moves == ()
        for value, other in live.items():
            assert space.view(other).eq(value).all()
        assert space.num_used == sum(other.size for other in live.values())


def test_the_opening_that_moves_least_is_found_and_a_held_extent_stays() -> None:
    space = arena(1280)
    sizes = (128, 256, 128, 128, 128, 128, 128, 256)
    extents = [space.allocate(size) for size in sizes]
    a, big, b, held, c, d, e, last = (extent for extent in extents if extent is not None)
    for extent in (a, b, d):
        space.free(extent)
    # Between a's hole and b's lies `big`, between b's and d's two of half its size, of which one is held.
    held.held = True
    opening = space.find(256)
    assert opening is not None
    assert opening.moves == (big,)
    held.held = False
    big.held = True
    opening = space.find(256)
    assert opening is not None
    assert opening.moves == (held, c)
    assert space.make(opening) == [held, c]
    assert (held.start, c.start) == (384, 512)
    assert space.find(384) is None
    assert space.find(384, without=[e]) == Opening(640)
    assert last.start == 1024


def test_nothing_is_freed_to_find_out_what_freeing_would_bring() -> None:
    space = arena(512)
    extents = [space.allocate(128) for _ in range(4)]
    first, second = extents[0], extents[1]
    assert first is not None
    assert second is not None
    assert space.find(256, without=[first, second]) == Opening(0)
    assert space.num_free == 0
