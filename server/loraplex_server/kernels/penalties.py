# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Biases, penalties and forbidden tokens on the rows that ask for them; other rows are not even read. Defined by
``penalties_ref``."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options

_PART = 4096


@triton.jit
def _add_bias_kernel(
    logits_ptr, stride, ids_ptr, values_ptr, num_entries, ENTRIES: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.load(ids_ptr + row * num_entries + entry, mask=entry < num_entries, other=-1)
    values = tl.load(values_ptr + row * num_entries + entry, mask=entry < num_entries, other=0.0)
    at = logits_ptr + row * stride + ids
    tl.store(at, tl.load(at, mask=ids >= 0, other=0.0) + values, mask=ids >= 0)


@triton.jit
def _penalize_kernel(
    logits_ptr, stride, size, in_prompt_ptr, counts_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * PART + tl.arange(0, PART)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    mask = ids < size
    counts = tl.load(counts_ptr + row * size + ids, mask=mask, other=0).to(tl.float32)
    in_prompt = tl.load(in_prompt_ptr + row * size + ids, mask=mask, other=0) != 0
    x = tl.load(logits_ptr + row * stride + ids, mask=mask, other=0.0)
    repeated = tl.where(x > 0.0, tl.math.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    x = tl.where(in_prompt | (counts > 0.0), repeated, x)
    x = tl.where(counts > 0.0, x - (presence + frequency * counts), x)
    tl.store(logits_ptr + row * stride + ids, x, mask=mask & (in_prompt | (counts > 0.0)))


@triton.jit
def _forbid_kernel(
    logits_ptr, stride, ids_ptr, until_ptr, positions_ptr, num_entries, ENTRIES: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(positions_ptr + row) >= tl.load(until_ptr + row):
        return
    ids = tl.load(ids_ptr + row * num_entries + entry, mask=entry < num_entries, other=-1)
    tl.store(logits_ptr + row * stride + ids, float("-inf"), mask=ids >= 0)


@triton.jit
def _count_kernel(counts_ptr, stride, token_ids_ptr, kv_lens_ptr, num_rows, ROWS: tl.constexpr, PDL: tl.constexpr):
    row = tl.arange(0, ROWS)
    mask = row < num_rows
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mask = mask & (tl.load(kv_lens_ptr + row, mask=mask, other=0) > 0)
    token = tl.load(token_ids_ptr + row, mask=mask, other=0)
    at = counts_ptr + row.to(tl.int64) * stride + token
    count = tl.load(at, mask=mask, other=0).to(tl.int32)
    tl.store(at, tl.minimum(count + 1, 32767).to(tl.int16), mask=mask)


def add_bias(logits: Tensor, ids: Tensor, values: Tensor) -> None:
    """``add_bias_ref``; rows of logits, and the whole of ids and values, are contiguous."""
    num_rows, num_entries = ids.shape
    if num_rows and num_entries:
        _add_bias_kernel[(num_rows,)](
            logits, logits.stride(0), ids, values, num_entries,
            ENTRIES=triton.next_power_of_2(num_entries), num_warps=4, **launch_options(logits.device),
        )  # fmt: skip


def penalize(
    logits: Tensor, in_prompt: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """``penalize_ref``; rows of logits, and the whole of in_prompt and output_counts, are contiguous."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        _penalize_kernel[(num_rows, triton.cdiv(vocab_size, _PART))](
            logits, logits.stride(0), vocab_size, in_prompt.view(torch.int8), output_counts, repetition, presence,
            frequency, PART=_PART, num_warps=8, **launch_options(logits.device),
        )  # fmt: skip


def forbid(logits: Tensor, ids: Tensor, until: Tensor, positions: Tensor) -> None:
    """``forbid_ref``; rows of logits, and the whole of the others, are contiguous."""
    num_rows, num_entries = ids.shape
    if num_rows and num_entries:
        _forbid_kernel[(num_rows,)](
            logits, logits.stride(0), ids, until, positions, num_entries,
            ENTRIES=triton.next_power_of_2(num_entries), num_warps=4, **launch_options(logits.device),
        )  # fmt: skip


def count_tokens(counts: Tensor, token_ids: Tensor, kv_lens: Tensor) -> None:
    """``count_tokens_ref``; rows of counts, and the whole of the others, are contiguous."""
    num_rows = counts.shape[0]
    if num_rows:
        _count_kernel[(1,)](
            counts, counts.stride(0), token_ids, kv_lens, num_rows,
            ROWS=max(256, triton.next_power_of_2(num_rows)), num_warps=4, **launch_options(counts.device),
        )  # fmt: skip
