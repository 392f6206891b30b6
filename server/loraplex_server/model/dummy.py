"""Random weights in the place of a checkpoint, for measuring and testing without one."""

import torch
from torch import Tensor

from loraplex_server.model.reader import Progress
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.tensor_names import tensor_shapes

_SEED = 0
_STD = 0.02


class DummyTensors:
    """Makes the tensors of a checkpoint of ``spec``: norms of one, the rest normal with standard deviation 0.02.

    The same spec, dtype and kind of device give the same weights.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        self._shapes = tensor_shapes(spec)
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._generator = torch.Generator(device).manual_seed(_SEED)
        self._done_bytes = 0
        self._total_bytes = sum(torch.Size(shape).numel() for shape in self._shapes.values()) * dtype.itemsize

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def take(self, name: str) -> Tensor:
        """The tensor ``name``, on the device."""
        tensor = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(0, _STD, generator=self._generator)
        self._done_bytes += tensor.numel() * tensor.element_size()
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return tensor
