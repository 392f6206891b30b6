"""The tables in which kernels find adapters."""

import pytest
import torch

from loraplex_server.engine.adapter_image import build_image
from tests.engine.support import BASE, random_weights

pytest.importorskip("triton")

from loraplex_server.engine.device_adapters import DeviceAdapters


def test_a_slot_names_offset_and_ranks_of_every_group_and_is_empty_once_forgotten() -> None:
    ranks = {(0, "q_proj"): 3, (0, "v_proj"): 9, (1, "down_proj"): 24}
    image = build_image(random_weights(ranks), BASE, torch.float32, pinned=False)
    tables = DeviceAdapters(BASE, torch.zeros(1 << 16), max_rows=4, fuses=False)
    for slot, start in ((0, 1024), (2, 4096), (0, 2048)):  # a second adapter of the layout, and the first moved
        tables.place(slot, start, image.layout)
    groups = image.layout.groups
    for slot, start in ((0, 2048), (2, 4096)):
        table = tables.factors(0, "qkv").table[slot]
        assert table.tolist()[:5] == [start + groups[0, "qkv"].offset, 24, 8, 0, 16]
        assert tables.factors(1, "down").table[slot].tolist()[:3] == [start + groups[1, "down"].offset, 24, 24]
        assert tables.factors(0, "o").table[slot].eq(0).all()
        assert tables.fits(slot)
    assert not tables.fits(1)
    tables.forget(0)
    assert not tables.fits(0)
    assert tables.factors(0, "qkv").table[0].eq(0).all()
    assert tables.factors(0, "qkv").table[2, 0] == 4096 + groups[0, "qkv"].offset
