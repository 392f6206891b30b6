# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Log-probabilities of each row's drawn token and of its 20 most likely ones, in two launches without a sort.

Every program takes one part of one row's vocabulary: its sum of exponentials, and its 20 best by taking the best away 20
times. The second launch does the same with the parts' best. Defined by ``logprobs_ref``; of equal values the lowest ids
come first.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options

# The most likely tokens of a row that are reported; the OpenAI API asks for no more.
NUM_TOP: Final = 20
_PART: Final = 4096
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _take_best(values, ids, values_at, ids_at, K: tl.constexpr):
    """Store the K best (value, id) in order, the lowest id first among equals."""
    for i in range(K):
        best = tl.max(values, axis=0)
        best_id = tl.min(tl.where(values == best, ids, _NO_ID), axis=0)
        tl.store(values_at + i, best)
        tl.store(ids_at + i, best_id)
        taken = (values == best) & (ids == best_id)
        values = tl.where(taken, float("-inf"), values)
        ids = tl.where(taken, _NO_ID, ids)


@triton.jit
def _part_kernel(
    logits_ptr, stride, size, num_parts, highs_ptr, sums_ptr, values_ptr, ids_ptr,
    PART: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = part * PART + tl.arange(0, PART)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
    high = tl.max(x, axis=0)
    at = row * num_parts + part
    tl.store(highs_ptr + at, high)
    tl.store(sums_ptr + at, tl.sum(tl.exp(x - tl.where(high > float("-inf"), high, 0.0)), axis=0))
    _take_best(x, ids, values_ptr + at * K, ids_ptr + at * K, K)


@triton.jit
def _row_kernel(
    logits_ptr, stride, num_parts, token_ids_ptr, highs_ptr, sums_ptr, values_ptr, ids_ptr,
    chosen_ptr, top_values_ptr, top_ids_ptr,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.arange(0, PARTS)
    highs = tl.load(highs_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_parts + part, mask=part < num_parts, other=0.0)
    high = tl.max(highs, axis=0)
    normalizer = high + tl.log(tl.sum(sums * tl.exp(highs - high), axis=0))
    token = tl.load(token_ids_ptr + row)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + row * stride + token).to(tl.float32) - normalizer)
    entry = tl.arange(0, ENTRIES)
    at = row * num_parts * K + entry
    values = tl.load(values_ptr + at, mask=entry < num_parts * K, other=float("-inf")) - normalizer
    values = tl.where(values == values, values, float("-inf"))
    ids = tl.load(ids_ptr + at, mask=entry < num_parts * K, other=_NO_ID)
    _take_best(values, ids, top_values_ptr + row * K, top_ids_ptr + row * K, K)


@dataclass(frozen=True, slots=True)
class LogprobWorkspace:
    """What the two launches hand to each other; reused by every step, never by two streams at once.

    Shapes, for R rows of P parts: highs, sums [R, P] float32; values [R, P, 20] float32; ids [R, P, 20] int32.
    """

    highs: Tensor
    sums: Tensor
    values: Tensor
    ids: Tensor

    @classmethod
    def allocate(cls, *, max_rows: int, vocab_size: int, device: torch.device) -> "LogprobWorkspace":
        parts = (max_rows, triton.cdiv(vocab_size, _PART))
        return cls(
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty((*parts, NUM_TOP), dtype=torch.float32, device=device),
            torch.empty((*parts, NUM_TOP), dtype=torch.int32, device=device),
        )


def logprobs(
    logits: Tensor, token_ids: Tensor, workspace: LogprobWorkspace, chosen: Tensor, top_values: Tensor, top_ids: Tensor
) -> None:
    """``logprobs_ref`` with k = 20 into given tensors; a vocabulary of fewer tokens fills up with -inf.

    Shapes: logits [R, V], each row contiguous; token_ids [R] int64; chosen [R] float32; top_values [R, 20] float32;
    top_ids [R, 20] int32, all contiguous.
    """
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    num_parts, options = triton.cdiv(vocab_size, _PART), launch_options(logits.device)
    _part_kernel[(num_rows, num_parts)](
        logits, logits.stride(0), vocab_size, num_parts, workspace.highs, workspace.sums, workspace.values,
        workspace.ids, PART=_PART, K=NUM_TOP, num_warps=8, **options,
    )  # fmt: skip
    _row_kernel[(num_rows,)](
        logits, logits.stride(0), num_parts, token_ids, workspace.highs, workspace.sums, workspace.values,
        workspace.ids, chosen, top_values, top_ids, PARTS=triton.next_power_of_2(num_parts),
        ENTRIES=triton.next_power_of_2(num_parts * NUM_TOP), K=NUM_TOP, num_warps=4, **options,
    )  # fmt: skip
