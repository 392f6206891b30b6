"""What sampling means, in plain torch: the definition that faster samplers are checked against.

A token is drawn by the Gumbel trick: the kept token with the largest ``logit / temperature + gumbel``, where the noise
is a hash of (seed, position, token id). No sort, no running sum, no generator state: a sequence draws the same tokens
whatever else is in its batch, on any device, and a difference in the last bit of a logit moves no boundary.

Kept tokens: the ``top_k`` largest logits; of those, the smallest set of most likely ones whose probability (after
temperature, renormalized) reaches ``top_p``; of those, the ones at least ``min_p`` times as likely as the most likely.
Ties with the last kept token are kept. Temperature 0 is the arg max, lowest id first.
"""

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit integer hash (lowbias32 by Chris Wellons), on int64 tensors that hold 32 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK_32
    x = x ^ (x >> 15)
    # The product below passes 2**63 and wraps; its low 32 bits are right all the same.
    x = (x * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)


def uniform_ref(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Uniform noise in (0, 1) for every (row, token id).

    Shapes: seeds [R] int64, positions [R] int64 -> [R, num_tokens] float32.
    """
    low, high = seeds & _MASK_32, (seeds >> 32) & _MASK_32
    row = _mix(_mix(_mix(low) ^ high) ^ (positions & _MASK_32))
    ids = torch.arange(num_tokens, device=seeds.device)
    bits = _mix(row[:, None] ^ _mix(ids)[None, :])
    # 23 bits and the half fill a float32's mantissa. With one bit more the highest value would round to 1, whose noise
    # is infinite: at 128,256 tokens one draw in 130 would ignore the logits.
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def keep_ref(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens may be drawn, as a mask [R, V].

    Shapes: logits [R, V] float32, already divided by the temperature; top_k [R] int64 (0 = off), top_p [R], min_p [R].
    """
    num_tokens = logits.shape[1]
    ordered = logits.sort(dim=1, descending=True).values
    k = torch.where(top_k > 0, top_k.clamp(max=num_tokens), num_tokens)
    kth = ordered.gather(1, k[:, None] - 1)
    probs = torch.softmax(ordered.masked_fill(ordered < kth, float("-inf")), dim=1)
    # A token belongs to the nucleus when what stands before it has not reached top_p yet.
    before = probs.cumsum(dim=1) - probs
    in_nucleus = (before < top_p[:, None]) & (probs > 0)
    last = in_nucleus.sum(dim=1).clamp(min=1)
    nucleus_floor = ordered.gather(1, last[:, None] - 1)
    min_p_floor = ordered[:, :1] + min_p.clamp(min=1e-38).log()[:, None]
    floor = torch.maximum(kth, nucleus_floor)
    floor = torch.where(min_p[:, None] > 0, torch.maximum(floor, min_p_floor), floor)
    return logits >= floor


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draw one token a row; defines ``sample``.

    Shapes: logits [R, V] float32 (penalties and biases already applied); temperature, top_p, min_p [R] float32;
    top_k, seeds, positions [R] int64 -> [R] int64. ``positions`` counts the tokens before the drawn one.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if bool(filtered.any()):
        scaled = scaled.masked_fill(~keep_ref(scaled, top_k, top_p, min_p), float("-inf"))
    noise = -torch.log(-torch.log(uniform_ref(seeds, positions, logits.shape[1])))
    return torch.where(greedy[:, None], logits, scaled + noise).argmax(dim=1)
