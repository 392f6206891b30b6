# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""One token a row, drawn on the device without a sort and without a word from the host. Defined by ``sample_ref``.

Every program takes one part of one row's vocabulary. Rows without filters need two launches: the best (noisy) score
of each part, then of each row. Rows with top-k, top-p or min-p take three more in between: a histogram over the
row's range of logits, the lowest bin above which few enough tokens lie, and a copy of those tokens. The last launch
finds the kept tokens among those by bisection; in the rare row where they do not hold the answer (a nucleus of
thousands of tokens) it reads the whole row instead, slowly and just as exactly.

No program writes what another one of the same launch reads, and sums have a fixed order: results repeat bit by bit.
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Final

import torch
import triton
from torch import Tensor

from loraplex_server.kernels.launch import launch_options
from loraplex_server.kernels.sampling_choose import choose
from loraplex_server.kernels.sampling_device import compact, histogram, levels, score

PART: Final = 4096
_BINS: Final = 64
_MAX_CANDIDATES: Final = 2048


class SamplingMode(Enum):
    """What the rows of a launch may ask for; the host knows, and a CUDA graph is captured for each."""

    GREEDY = "every row has temperature 0"
    PLAIN = "no row has top_k, top_p or min_p"
    FILTERED = "any row may ask for anything"


@dataclass(frozen=True, slots=True)
class SampleWorkspace:
    """What the launches hand to each other; reused by every step, never by two streams at once.

    Shapes, for R rows of P parts: scores, lows, masses [R, P] float32; ids, offsets [R, P] int32; bins [R, P, 64]
    int32; taken [R, 2] int32 (bins, tokens); values [R, 2048] float32 and value_ids [R, 2048] int32.
    """

    scores: Tensor
    ids: Tensor
    lows: Tensor
    masses: Tensor
    bins: Tensor
    taken: Tensor
    offsets: Tensor
    values: Tensor
    value_ids: Tensor

    @classmethod
    def allocate(cls, *, max_rows: int, vocab_size: int, device: torch.device) -> "SampleWorkspace":
        num_parts = triton.cdiv(vocab_size, PART)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty((max_rows, *shape), dtype=dtype, device=device)

        return cls(
            scores=empty(num_parts),
            ids=empty(num_parts, dtype=torch.int32),
            lows=empty(num_parts),
            masses=empty(num_parts),
            bins=empty(num_parts, _BINS, dtype=torch.int32),
            taken=empty(2, dtype=torch.int32),
            offsets=empty(num_parts, dtype=torch.int32),
            values=empty(_MAX_CANDIDATES),
            value_ids=empty(_MAX_CANDIDATES, dtype=torch.int32),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    workspace: SampleWorkspace,
    *,
    mode: SamplingMode = SamplingMode.FILTERED,
    out: Tensor | None = None,
    finite: Tensor | None = None,
) -> Tensor:
    """``sample_ref``, for rows that ask for no more than ``mode`` allows.

    ``finite`` [R] bool is set to False for rows that hold a NaN, whose token then means nothing.
    Shapes: logits [R, V] float32 or 16 bit, each row contiguous; temperature, top_p, min_p [R] float32; top_k, seeds,
    positions [R] int64; out [R] int64 -> [R] int64.
    """
    num_rows, vocab_size = logits.shape
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if finite is None:
        finite = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows == 0:
        return out
    num_parts = triton.cdiv(vocab_size, PART)
    options = launch_options(logits.device)
    noisy, filtered = mode is not SamplingMode.GREEDY, mode is SamplingMode.FILTERED
    # The interpreter has no libdevice; its own logarithm is exact enough.
    accurate = {"ACCURATE_LOG": logits.device.type == "cuda"}
    row_args = (logits, logits.stride(0), vocab_size, num_parts, temperature, top_k, top_p, min_p)
    parts = (num_rows, num_parts)
    score[parts](
        *row_args, seeds, positions, workspace.scores, workspace.ids, workspace.lows,
        PART=PART, NOISY=noisy, FILTERED=filtered, num_warps=8, **accurate, **options,
    )  # fmt: skip
    part_block = triton.next_power_of_2(num_parts)
    if filtered:
        histogram[parts](
            *row_args, workspace.scores, workspace.lows, workspace.masses, workspace.bins,
            PART=PART, PART_BLOCK=part_block, BINS=_BINS, num_warps=8, **options,
        )  # fmt: skip
        levels[(num_rows,)](
            vocab_size, num_parts, temperature, top_k, top_p, min_p, workspace.bins, workspace.taken,
            workspace.offsets, PART_BLOCK=part_block, BINS=_BINS, CANDIDATES=_MAX_CANDIDATES, num_warps=4, **options,
        )  # fmt: skip
        compact[parts](
            *row_args, workspace.scores, workspace.lows, workspace.taken, workspace.offsets, workspace.values,
            workspace.value_ids,
            PART=PART, PART_BLOCK=part_block, BINS=_BINS, CANDIDATES=_MAX_CANDIDATES, num_warps=8, **options,
        )  # fmt: skip
    choose[(num_rows,)](
        *row_args, seeds, positions, workspace.scores, workspace.ids, workspace.lows, workspace.masses,
        workspace.taken, workspace.values, workspace.value_ids, out, finite.view(torch.int8),
        PART=PART, PART_BLOCK=part_block, CANDIDATES=_MAX_CANDIDATES, FILTERED=filtered,
        num_warps=16 if filtered else 1, **accurate, **options,
    )  # fmt: skip
    return out
