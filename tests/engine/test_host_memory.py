"""Host memory that images share."""

import torch

from loraplex_server.engine.host_memory import SEGMENT_BYTES, HostMemory

SEGMENT = SEGMENT_BYTES // 4


def memory(num_elements: int) -> HostMemory:
    return HostMemory(num_elements * 4, torch.float32, pinned=False)


def test_memory_that_was_given_back_is_used_again() -> None:
    host = memory(1024)
    first, second = host.take(512), host.take(512)
    assert first is not None
    assert second is not None
    assert host.take(128) is None
    address = first.tensor(512).data_ptr()
    host.give(first)
    third = host.take(300)
    assert third is not None
    assert third.tensor(300).data_ptr() == address


def test_segments_that_are_too_small_make_way_for_an_image_that_is_large() -> None:
    host = memory(SEGMENT + 4096)
    small = host.take(128)
    assert small is not None
    assert host.take(SEGMENT + 1024) is None
    host.give(small)
    assert host.take(SEGMENT + 1024) is not None


def test_beyond_the_limit_only_when_asked_and_not_for_longer_than_needed() -> None:
    host = memory(1024)
    assert host.take(4096) is None
    block = host.take(4096, beyond_limit=True)
    assert block is not None
    assert block.tensor(4096).numel() == 4096
    host.give(block)
    assert host.take(4096) is None
    assert host.take(1024) is not None


def test_one_segment_is_made_ahead_of_its_use_while_the_limit_allows() -> None:
    host = memory(2 * SEGMENT)
    (first,) = host.spares()
    assert host.spares() == []
    block = host.take(128)
    assert block is not None
    assert block.segment is first
    assert len(host.spares()) == 1
    assert host.take(SEGMENT) is not None
    assert host.spares() == []
