# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM108
"""The device code of ``sample`` up to its last launch: noise, the best of each part, and a filter's candidates."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice


@triton.jit
def _mix(x):
    """``sampling_ref``'s hash, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def log_of(x, ACCURATE_LOG: tl.constexpr):
    # The hardware's logarithm is off by all of its digits near 1, where most of the noise comes from.
    if ACCURATE_LOG:
        y = libdevice.log(x)
    else:
        y = tl.log(x)
    return y


@triton.jit
def gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG: tl.constexpr):
    seed = tl.load(seeds_ptr + row)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    position = (tl.load(positions_ptr + row) & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix(_mix(_mix(_mix(low) ^ high) ^ position) ^ _mix(ids.to(tl.uint32)))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -log_of(-log_of(uniform, ACCURATE_LOG), ACCURATE_LOG)


@triton.jit
def is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
    k = tl.load(top_k_ptr + row)
    asks = ((k > 0) & (k < size)) | (tl.load(top_p_ptr + row) < 1.0) | (tl.load(min_p_ptr + row) > 0.0)
    return asks & (tl.load(temperature_ptr + row) != 0.0)


@triton.jit
def load_logits(logits_ptr, row, stride, size, ids):
    """Logits as float32, -inf past the end."""
    return tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < size, other=float("-inf")).to(tl.float32)


@triton.jit
def divided(x, temperature):
    """Rounded as torch divides; the hardware's own division is not."""
    return tl.math.div_rn(x, tl.where(temperature == 0.0, 1.0, temperature) + tl.zeros_like(x))


@triton.jit
def best_of(scores, ids, size):
    """Highest score and its lowest id."""
    highest = tl.max(scores, axis=0)
    return highest, tl.min(tl.where(scores == highest, ids, size - 1), axis=0)


@triton.jit
def score(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    scores_ptr, ids_ptr, lows_ptr,
    PART: tl.constexpr, NOISY: tl.constexpr, FILTERED: tl.constexpr, ACCURATE_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best score of a part; of a row that filters, its highest and lowest logit instead, without noise."""
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = part * PART + tl.arange(0, PART)
    scores = load_logits(logits_ptr, row, stride, size, ids)
    # A part with a NaN says so in its score; rows with one are reported, not drawn.
    spoiled = tl.max((scores != scores).to(tl.int32), axis=0) > 0
    scores = tl.where(scores == scores, scores, float("-inf"))
    if NOISY:
        temperature = tl.load(temperature_ptr + row)
        draws = temperature != 0.0
        if FILTERED:
            filtered = is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr)
            draws = draws & (filtered == 0)
            if filtered:
                low = tl.min(tl.where(scores > float("-inf"), scores, float("inf")), axis=0)
                tl.store(lows_ptr + row * num_parts + part, low)
        if draws:
            scores = divided(scores, temperature) + gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG)
    highest, best_id = best_of(scores, ids, size)
    tl.store(scores_ptr + row * num_parts + part, tl.where(spoiled, float("nan"), highest))
    tl.store(ids_ptr + row * num_parts + part, best_id)


@triton.jit
def _row_high(scores_ptr, row, num_parts, PART_BLOCK: tl.constexpr):
    parts = tl.arange(0, PART_BLOCK)
    return tl.max(tl.load(scores_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf")), axis=0)


@triton.jit
def row_low(lows_ptr, row, num_parts, PART_BLOCK: tl.constexpr):
    parts = tl.arange(0, PART_BLOCK)
    return tl.min(tl.load(lows_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("inf")), axis=0)


@triton.jit
def _bin(x, high, low, BINS: tl.constexpr):
    """Which of BINS equal slices of the row's range a logit falls into, the highest first; all that is far below the
    highest falls into the last, so that one forbidding bias does not stretch the others."""
    depth = (high - x) * (BINS / tl.where(high > low, tl.minimum(high - low, 64.0), 1.0))
    return tl.where(depth < BINS - 1, depth, BINS - 1).to(tl.int32)


@triton.jit
def histogram(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    scores_ptr, lows_ptr, masses_ptr, bins_ptr,
    PART: tl.constexpr, PART_BLOCK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For a row that filters: how many tokens of a part fall into each bin, and the part's share of the softmax."""
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr) == 0:
        return
    ids = part * PART + tl.arange(0, PART)
    x = load_logits(logits_ptr, row, stride, size, ids)
    high = _row_high(scores_ptr, row, num_parts, PART_BLOCK)
    mass = tl.sum(tl.exp((x - high) * (1.0 / tl.load(temperature_ptr + row))), axis=0)
    tl.store(masses_ptr + row * num_parts + part, mass)
    counts = tl.histogram(_bin(x, high, row_low(lows_ptr, row, num_parts, PART_BLOCK), BINS), BINS)
    bins = tl.arange(0, BINS)
    # Entries past the end of the vocabulary sit in the last bin, which is never taken as a whole.
    tl.store(bins_ptr + (row * num_parts + part) * BINS + bins, counts)


@triton.jit
def levels(
    size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, bins_ptr, taken_ptr, offsets_ptr,
    PART_BLOCK: tl.constexpr, BINS: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For a row that filters: how many bins from the top hold at most CANDIDATES tokens together, how many tokens
    those are, and how many of them come before each part."""
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr) == 0:
        return
    parts, bins = tl.arange(0, PART_BLOCK), tl.arange(0, BINS)
    at = bins_ptr + (row * num_parts + parts)[:, None] * BINS + bins[None, :]
    counts = tl.load(at, mask=(parts < num_parts)[:, None], other=0)
    totals = tl.cumsum(tl.sum(counts, axis=0), axis=0)
    # Never the last bin: what lies past the end of the vocabulary is counted there.
    taken = tl.minimum(tl.sum((totals <= CANDIDATES).to(tl.int32), axis=0), BINS - 1)
    in_part = tl.sum(tl.where((bins < taken)[None, :], counts, 0), axis=1)
    tl.store(taken_ptr + row * 2, taken)
    tl.store(taken_ptr + row * 2 + 1, tl.sum(in_part, axis=0))
    tl.store(offsets_ptr + row * num_parts + parts, tl.cumsum(in_part, axis=0) - in_part, mask=parts < num_parts)


@triton.jit
def compact(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    scores_ptr, lows_ptr, taken_ptr, offsets_ptr, values_ptr, value_ids_ptr,
    PART: tl.constexpr, PART_BLOCK: tl.constexpr, BINS: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For a row that filters: the tokens of the taken bins, side by side in the order of their ids."""
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr) == 0:
        return
    taken = tl.load(taken_ptr + row * 2)
    offset = tl.load(offsets_ptr + row * num_parts + part)
    ids = part * PART + tl.arange(0, PART)
    x = load_logits(logits_ptr, row, stride, size, ids)
    high = _row_high(scores_ptr, row, num_parts, PART_BLOCK)
    wanted = _bin(x, high, row_low(lows_ptr, row, num_parts, PART_BLOCK), BINS) < taken
    place = row * CANDIDATES + offset + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    tl.store(values_ptr + place, x, mask=wanted)
    tl.store(value_ids_ptr + place, ids, mask=wanted)
