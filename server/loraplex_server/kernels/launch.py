"""How Triton kernels are launched on the device at hand."""

from functools import cache

import torch


@cache
def _has_dependent_launch(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments for a kernel with a ``PDL`` parameter.

    With programmatic dependent launch (Hopper and later) a kernel starts while the one before it drains, and waits at
    its own ``gdc_wait`` before it touches anything another kernel wrote: about a microsecond saved per launch. Every
    program of such a kernel must wait, or the kernel after it could pass the one before it.
    """
    if device.type != "cuda" or not _has_dependent_launch(device.index or 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
