"""What an adapter's image is made from: factors that are in memory, or a stored file."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterLayout as FileLayout
from loraplex_adapters.format import AdapterWeights
from loraplex_adapters.stored import StoredAdapter
from loraplex_server.engine.adapter_image import AdapterImage, AdapterLayout, fill_image, plan_layout
from loraplex_server.engine.read_plan import ReadPlan, plan_reads

OpenAdapter = Callable[[str], AdapterWeights | StoredAdapter]
"""Finds the adapter of a digest. What it raises fails the requests that wait for the adapter."""

_PLANS_KEPT = 64


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

    def image(self, data: Tensor, threads: Executor) -> AdapterImage:
        fill_image(data, self.weights, self.layout)
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

    def __init__(self, base: BaseShape, dtype: torch.dtype, *, rank_major: bool, rescale_on_device: bool) -> None:
        self._base = base
        self._dtype = dtype
        self._rank_major = rank_major
        self._rescale_on_device = rescale_on_device
        # By the identity of the file's layout, which the value keeps alive.
        self._plans: OrderedDict[int, tuple[FileLayout, ReadPlan]] = OrderedDict()

    def source(self, opened: AdapterWeights | StoredAdapter) -> ImageSource:
        if isinstance(opened, AdapterWeights):
            return FactorSource(opened, plan_layout(opened.ranks, self._base, rank_major=self._rank_major))
        return FileSource(opened, self._plan(opened.layout))

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
