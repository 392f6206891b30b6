"""Biases, penalties and forbidden tokens on logits, and the counts behind them, in plain torch: the definition that the
kernels are checked against."""

import torch
from torch import Tensor


def add_bias_ref(logits: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add each row's biases in place; -inf forbids a token.

    Shapes: logits [R, V] float32; ids [R, N] int32, -1 = no entry, distinct within a row; values [R, N] float32.
    """
    rows, entries = (ids >= 0).nonzero(as_tuple=True)
    logits[rows, ids[rows, entries].long()] += values[rows, entries]


def penalize_ref(
    logits: Tensor, in_prompt: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Make tokens that occurred less likely, in place.

    Repetition counts prompt and answer: positive logits are divided by it, the others multiplied. Presence and
    frequency count the answer, as the OpenAI API defines them. 1, 0 and 0 change nothing.
    Shapes: logits [R, V] float32; in_prompt [R, V] bool; output_counts [R, V] int16 or int32; repetition, presence,
    frequency [R] float32.
    """
    factor = repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits.copy_(torch.where(in_prompt | (output_counts > 0), repeated, logits))
    lowered = logits - (presence[:, None] + frequency[:, None] * output_counts)
    logits.copy_(torch.where(output_counts > 0, lowered, logits))


def forbid_ref(logits: Tensor, ids: Tensor, until: Tensor, positions: Tensor) -> None:
    """Forbid tokens, in place, in rows whose position is below ``until``.

    Shapes: logits [R, V] float32; ids [R, N] int32, -1 = no entry; until [R] int32; positions [R] int64.
    """
    rows, entries = ((ids >= 0) & (positions < until)[:, None]).nonzero(as_tuple=True)
    logits[rows, ids[rows, entries].long()] = float("-inf")


def count_tokens_ref(counts: Tensor, token_ids: Tensor, kv_lens: Tensor) -> None:
    """Count one token of each row whose ``kv_lens`` is not 0; a count stays at 32,767.

    Shapes: counts [R, V] int16; token_ids [R] int64; kv_lens [R] int32.
    """
    rows = (kv_lens > 0).nonzero()[:, 0]
    columns = token_ids[rows]
    counts[rows, columns] = (counts[rows, columns].int() + 1).clamp(max=32767).short()
