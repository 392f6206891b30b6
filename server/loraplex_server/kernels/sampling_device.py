# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM102, SIM108
"""The device code of ``sample``: its four launches, and the hash and the bisection that they share."""

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
def _log(x, ACCURATE_LOG: tl.constexpr):
    # The hardware's logarithm is off by all of its digits near 1, where most of the noise comes from.
    if ACCURATE_LOG:
        y = libdevice.log(x)
    else:
        y = tl.log(x)
    return y


@triton.jit
def _gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG: tl.constexpr):
    seed = tl.load(seeds_ptr + row)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    position = (tl.load(positions_ptr + row) & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix(_mix(_mix(_mix(low) ^ high) ^ position) ^ _mix(ids.to(tl.uint32)))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -_log(-_log(uniform, ACCURATE_LOG), ACCURATE_LOG)


@triton.jit
def _is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
    k = tl.load(top_k_ptr + row)
    asks = ((k > 0) & (k < size)) | (tl.load(top_p_ptr + row) < 1.0) | (tl.load(min_p_ptr + row) > 0.0)
    return asks & (tl.load(temperature_ptr + row) != 0.0)


@triton.jit
def _load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr):
    """Logits over temperature, -inf past the end; unscaled in a greedy row."""
    temperature = tl.load(temperature_ptr + row)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
    return tl.math.div_rn(x, tl.where(temperature == 0.0, 1.0, temperature) + tl.zeros_like(x))


@triton.jit
def _best(scores, ids, size):
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
    x = _load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr)
    scores = x
    if NOISY:
        draws = tl.load(temperature_ptr + row) != 0.0
        if FILTERED:
            filtered = _is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr)
            draws = draws & (filtered == 0)
            if filtered:
                low = tl.min(tl.where(x > float("-inf"), x, float("inf")), axis=0)
                tl.store(lows_ptr + row * num_parts + part, low)
        if draws:
            scores = x + _gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG)
    # A part with a NaN says so in its score; rows with one are reported, not drawn.
    spoiled = tl.max((x != x).to(tl.int32), axis=0) > 0
    highest, best_id = _best(tl.where(x == x, scores, float("-inf")), ids, size)
    tl.store(scores_ptr + row * num_parts + part, tl.where(spoiled, float("nan"), highest))
    tl.store(ids_ptr + row * num_parts + part, best_id)


@triton.jit
def _row_high(scores_ptr, row, num_parts, PART_BLOCK: tl.constexpr):
    parts = tl.arange(0, PART_BLOCK)
    return tl.max(tl.load(scores_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf")), axis=0)


@triton.jit
def _bin(x, high, row, num_parts, lows_ptr, PART_BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Which of BINS equal slices of the row's range each logit falls into, the highest first."""
    parts = tl.arange(0, PART_BLOCK)
    low = tl.min(tl.load(lows_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("inf")), axis=0)
    depth = (high - x) * (BINS / tl.where(high > low, high - low, 1.0))
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
    if _is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr) == 0:
        return
    ids = part * PART + tl.arange(0, PART)
    x = _load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr)
    high = _row_high(scores_ptr, row, num_parts, PART_BLOCK)
    tl.store(masses_ptr + row * num_parts + part, tl.sum(tl.exp(x - high), axis=0))
    counts = tl.histogram(_bin(x, high, row, num_parts, lows_ptr, PART_BLOCK, BINS), BINS)
    bins = tl.arange(0, BINS)
    # Entries past the end of the vocabulary sit in the last bin, which is never taken as a whole.
    tl.store(bins_ptr + (row * num_parts + part) * BINS + bins, counts)


@triton.jit
def _taken_bins(bins_ptr, row, num_parts, before, PART_BLOCK: tl.constexpr, BINS: tl.constexpr, MOST: tl.constexpr):
    """How many bins from the top hold at most MOST tokens together; those tokens, in all parts and ``before`` one."""
    parts, bins = tl.arange(0, PART_BLOCK), tl.arange(0, BINS)
    at = bins_ptr + (row * num_parts + parts)[:, None] * BINS + bins[None, :]
    counts = tl.load(at, mask=(parts < num_parts)[:, None], other=0)
    totals = tl.cumsum(tl.sum(counts, axis=0), axis=0)
    taken = tl.minimum(tl.sum((totals <= MOST).to(tl.int32), axis=0), BINS - 1)
    within = (bins < taken)[None, :]
    total = tl.sum(tl.sum(tl.where(within, counts, 0), axis=0), axis=0)
    earlier = tl.where(within & (parts < before)[:, None], counts, 0)
    return taken, total, tl.sum(tl.sum(earlier, axis=0), axis=0)


@triton.jit
def compact(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    scores_ptr, lows_ptr, bins_ptr, values_ptr, value_ids_ptr,
    PART: tl.constexpr, PART_BLOCK: tl.constexpr, BINS: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For a row that filters: its most likely tokens, at most CANDIDATES, side by side in the order of their ids."""
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if _is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr) == 0:
        return
    taken, _, offset = _taken_bins(bins_ptr, row, num_parts, part, PART_BLOCK, BINS, CANDIDATES)
    ids = part * PART + tl.arange(0, PART)
    x = _load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr)
    high = _row_high(scores_ptr, row, num_parts, PART_BLOCK)
    wanted = _bin(x, high, row, num_parts, lows_ptr, PART_BLOCK, BINS) < taken
    place = row * CANDIDATES + offset + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    tl.store(values_ptr + place, x, mask=wanted)
    tl.store(value_ids_ptr + place, ids, mask=wanted)


@triton.jit
def _key(x):
    """An integer for each float, in the same order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _read(source_ptr, row, stride, size, start, temperature_ptr, IS_ROW: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    if IS_ROW:
        x = _load_scaled(source_ptr, row, stride, size, at, temperature_ptr)
    else:
        x = tl.load(source_ptr + row * stride + at, mask=at < size, other=float("-inf"))
    return x


@triton.jit
def _above(source_ptr, row, stride, size, temperature_ptr, high, key, IS_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Number and mass of the tokens whose key is at least ``key``."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        x = _read(source_ptr, row, stride, size, start, temperature_ptr, IS_ROW, BLOCK)
        inside = (_key(x) >= key) & (start + tl.arange(0, BLOCK) < size)
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp(x - high), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _lowest_key(
    source_ptr, row, stride, size, temperature_ptr, high, wanted_count, wanted_mass, lowest, num_above,
    IS_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key that divides the row as the highest one does above which both wanted amounts lie.

    ``lowest`` is a key that has them, with ``num_above`` tokens at it and above.
    """
    # 64 bits: the distance between two keys may take 33.
    has = lowest.to(tl.int64)
    lacks = _key(high).to(tl.int64) + 1
    num_has = num_above
    num_lacks = 0
    # One token between the two: nothing is left to tell apart.
    while (lacks - has > 1) & (num_has - num_lacks > 1):
        middle = has + ((lacks - has) >> 1)
        count, mass = _above(source_ptr, row, stride, size, temperature_ptr, high, middle, IS_ROW, BLOCK)
        if (count >= wanted_count) & (mass >= wanted_mass):
            has = middle
            num_has = count
        else:
            lacks = middle
            num_lacks = count
    return has


@triton.jit
def _draw(
    source_ptr, source_ids_ptr, row, stride, size, temperature_ptr, seeds_ptr, positions_ptr,
    high, k, p, min_p_floor, lowest, total,
    IS_ROW: tl.constexpr, ACCURATE_LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the kept tokens of a row, or of its candidates, and draw one of them."""
    floor = lowest.to(tl.int64)
    count = size
    if k > 0:
        floor = _lowest_key(
            source_ptr, row, stride, size, temperature_ptr, high, k, 0.0, lowest, size, IS_ROW, BLOCK
        )  # fmt: skip
        count, total = _above(source_ptr, row, stride, size, temperature_ptr, high, floor, IS_ROW, BLOCK)
    if p < 1.0:
        floor = _lowest_key(
            source_ptr, row, stride, size, temperature_ptr, high, 1, p * total, floor, count, IS_ROW, BLOCK
        )  # fmt: skip
    best = float("-inf")
    best_id = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _read(source_ptr, row, stride, size, start, temperature_ptr, IS_ROW, BLOCK)
        ids = at
        if not IS_ROW:
            ids = tl.load(source_ids_ptr + row * stride + at, mask=at < size, other=0)
        kept = (_key(x) >= floor) & (x >= min_p_floor) & (at < size)
        noisy = tl.where(kept, x + _gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG), float("-inf"))
        highest = tl.max(noisy, axis=0)
        if highest > best:
            best = highest
            best_id = tl.min(tl.where(noisy == highest, ids, 0x7FFFFFFF), axis=0)
    return best_id


@triton.jit
def choose(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    scores_ptr, ids_ptr, masses_ptr, bins_ptr, values_ptr, value_ids_ptr, out_ptr, finite_ptr,
    PART: tl.constexpr, PART_BLOCK: tl.constexpr, BINS: tl.constexpr, CANDIDATES: tl.constexpr,
    FILTERED: tl.constexpr, ACCURATE_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row's token: the best of its parts, or a draw among what its filters keep."""
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    parts = tl.arange(0, PART_BLOCK)
    scores = tl.load(scores_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    ids = tl.load(ids_ptr + row * num_parts + parts, mask=parts < num_parts, other=0x7FFFFFFF)
    finite = tl.max((scores != scores).to(tl.int32), axis=0) == 0
    high, token = _best(tl.where(scores == scores, scores, float("-inf")), ids, size)
    if FILTERED:
        if finite & _is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
            k = tl.load(top_k_ptr + row)
            k = tl.where(k < size, k, 0).to(tl.int32)
            p = tl.load(top_p_ptr + row)
            min_p = tl.load(min_p_ptr + row)
            min_p_floor = high + _log(tl.maximum(min_p, 1e-38), ACCURATE_LOG)
            min_p_floor = tl.where(min_p > 0.0, min_p_floor, float("-inf"))
            total = tl.sum(tl.load(masses_ptr + row * num_parts + parts, mask=parts < num_parts, other=0.0), axis=0)
            _, num, _ = _taken_bins(bins_ptr, row, num_parts, 0, PART_BLOCK, BINS, CANDIDATES)
            at = tl.arange(0, CANDIDATES)
            values = tl.load(values_ptr + row * CANDIDATES + at, mask=at < num, other=float("inf"))
            lowest = tl.min(values, axis=0)
            mass = tl.sum(tl.exp(tl.where(at < num, values, float("-inf")) - high), axis=0)
            holds_nucleus = ((p < 1.0) & (mass >= p * total)) | ((p >= 1.0) & (min_p_floor >= lowest))
            holds_all = (num > 0) & (((k > 0) & (k <= num)) | ((k == 0) & holds_nucleus))
            if holds_all:
                token = _draw(
                    values_ptr, value_ids_ptr, row, CANDIDATES, num, temperature_ptr, seeds_ptr, positions_ptr,
                    high, k, p, min_p_floor, _key(lowest), total, False, ACCURATE_LOG, CANDIDATES,
                )  # fmt: skip
            else:
                token = _draw(
                    logits_ptr, ids_ptr, row, stride, size, temperature_ptr, seeds_ptr, positions_ptr,
                    high, k, p, min_p_floor, _key(tl.full([], float("-inf"), tl.float32)), total,
                    True, ACCURATE_LOG, PART,
                )  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))
    tl.store(finite_ptr + row, finite.to(tl.int8))
