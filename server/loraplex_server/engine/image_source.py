"""What an adapter's image is made from: factors that are in memory, or a stored file."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.base import EMBED, HEAD, BaseShape
from loraplex_adapters.errors import UnsupportedAdapter
from loraplex_adapters.format import AdapterLayout as FileLayout
from loraplex_adapters.format import AdapterWeights
from loraplex_adapters.stored import StoredAdapter
from loraplex_server.engine.adapter_image import (
    OUTSIDE_GROUPS,
    AdapterImage,
    AdapterLayout,
    ExtraPlan,
    fill_image,
    group_of,
    plan_layout,
)
from loraplex_server.engine.epilogue import BaseWeights, Epilogue, epilogue_groups, epilogue_of
from loraplex_server.engine.image_outside import plan_outside
from loraplex_server.engine.read_plan import ReadPlan, plan_reads
from loraplex_server.model.adapters import GROUPS

OpenAdapter = Callable[[str], AdapterWeights | StoredAdapter]
"""Finds the adapter of a digest. What it raises fails the requests that wait for the adapter."""

_PLANS_KEPT = 64
# Adapters whose epilogues stay: of a model of 8 billion parameters, 11 MB each.
_EPILOGUES_KEPT = 32

Epilogues = Mapping[tuple[int, str], Epilogue]


class ImageSource(Protocol):
    """Something that an image can be made from."""

    @property
    def layout(self) -> AdapterLayout: ...

    def image(self, data: Tensor, threads: Executor) -> AdapterImage:
        """Make the image in ``data`` [num_elements], which may hold anything. Raises InvalidAdapter, OSError."""


@dataclass(frozen=True, slots=True)
class FactorSource:
    """Factors in memory (or mapped)."""

    weights: AdapterWeights
    layout: AdapterLayout
    epilogues: Callable[[], Epilogues] = dict

    def image(self, data: Tensor, threads: Executor) -> AdapterImage:
        fill_image(data, self.weights, self.layout, self.epilogues())
        return AdapterImage(data, self.layout)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A stored file, read in several threads at once, each tensor straight to its place where it need not change."""

    stored: StoredAdapter
    plan: ReadPlan

    @property
    def layout(self) -> AdapterLayout:
        return self.plan.layout

    def image(self, data: Tensor, threads: Executor) -> AdapterImage:
        self.plan.read(self.stored.weights_path, data, threads)
        return AdapterImage(data, self.layout, self.plan.rescales)


class ImageSources:
    """Plans images for one base and one device. Adapters with the same layout on disk share a plan.

    Used by one thread at a time.
    """

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        *,
        rank_major: bool,
        rescale_on_device: bool,
        weights: BaseWeights | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._rank_major = rank_major
        self._rescale_on_device = rescale_on_device
        self._weights = weights
        # What is computed from the base's weights must not wait for its steps, nor they for it.
        self._stream = stream
        # By the identity of the file's layout, which the value keeps alive.
        self._plans: OrderedDict[int, tuple[FileLayout, ReadPlan]] = OrderedDict()
        self._epilogues: OrderedDict[str, Epilogues] = OrderedDict()

    def source(self, opened: AdapterWeights | StoredAdapter, digest: str = "") -> ImageSource:
        """``digest``: under which what is computed for the adapter is kept. Raises: InvalidAdapter."""
        if isinstance(opened, StoredAdapter):
            if opened.layout.is_plain:
                return FileSource(opened, self._plan(opened.layout))
            opened = opened.weights()
        weights = opened.for_base(self._base)
        if weights.is_plain:
            return FactorSource(weights, plan_layout(weights.ranks, self._base, rank_major=self._rank_major))
        if self._weights is None:
            raise UnsupportedAdapter("the adapter changes more than the layers' linears, and the base is not at hand")
        return self._beyond_plain(weights, self._weights, digest)

    def _beyond_plain(self, weights: AdapterWeights, base: BaseWeights, digest: str) -> FactorSource:
        with torch.cuda.stream(self._stream):
            outside, vocab_sizes = plan_outside(weights, self._base, base, self._dtype)
        groups = epilogue_groups(weights, self._base, GROUPS)
        groups |= {group_of(m) for m in (EMBED, HEAD) if m in weights.factors and not weights.factors[m].is_plain}
        layout = plan_layout(
            weights.ranks,
            self._base,
            rank_major=self._rank_major,
            itemsize=self._dtype.itemsize,
            extra=ExtraPlan(groups, outside, vocab_sizes),
        )
        return FactorSource(weights, layout, partial(self._epilogues_of, weights, base, layout, digest))

    def _epilogues_of(
        self, weights: AdapterWeights, base: BaseWeights, layout: AdapterLayout, digest: str
    ) -> Epilogues:
        """Computed when the adapter is first made, and kept while it is among the last that were."""
        kept = self._epilogues.get(digest)
        if kept is not None:
            return kept
        made = {}
        with torch.cuda.stream(self._stream):  # nothing happens without one
            for (layer, group), place in layout.groups.items():
                if place.epilogue is None:
                    continue
                members = [(layer, name) for name in (GROUPS if layer >= 0 else OUTSIDE_GROUPS)[group]]
                sizes = [self._base.linears[name][0] for _, name in members] if layer >= 0 else [place.num_out]
                made[layer, group] = epilogue_of(members, sizes, weights, base)
        if digest:
            self._epilogues[digest] = made
            while len(self._epilogues) > _EPILOGUES_KEPT:
                self._epilogues.popitem(last=False)
        return made

    def _plan(self, file: FileLayout) -> ReadPlan:
        kept = self._plans.get(id(file))
        if kept is None:
            ranks = {module: file.rank(module) for module in file.modules}
            layout = plan_layout(ranks, self._base, rank_major=self._rank_major)
            plan = plan_reads(file, layout, self._dtype, rescale_on_device=self._rescale_on_device)
            kept = self._plans[id(file)] = (file, plan)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(id(file))
        return kept[1]
