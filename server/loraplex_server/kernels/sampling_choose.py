# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM102
"""The last launch of ``sample``: what a row's filters keep, found by bisection, and the token drawn."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.sampling_device import (
    best_of,
    divided,
    gumbel,
    is_filtered,
    load_logits,
    log_of,
    row_low,
)


@triton.jit
def _key(x):
    """An integer for each float, in the same order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float of a key."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(
    key, candidates, weights, high, logits_ptr, row, stride, size, per_unit, IS_ROW: tl.constexpr, PART: tl.constexpr
):
    """Number and mass of the tokens whose key is at least ``key``: of the candidates at hand, or of the whole row.

    A row is compared as it is, not divided by its temperature: the order is the same.
    """
    least = _value(key)
    if IS_ROW:
        counts = tl.zeros([PART], tl.int32)
        masses = tl.zeros([PART], tl.float32)
        for start in tl.range(0, size, PART, loop_unroll_factor=4):
            x = load_logits(logits_ptr, row, stride, size, start + tl.arange(0, PART))
            counts += (x >= least).to(tl.int32)
            masses += tl.where(x >= least, tl.exp2((x - high) * per_unit), 0.0)
        count, mass = tl.sum(counts, axis=0), tl.sum(masses, axis=0)
    else:
        both = tl.sum(tl.where(candidates >= least, weights, 0), axis=0)
        count = (both >> 50).to(tl.int32)
        mass = (both & 0x3FFFFFFFFFFFF).to(tl.float32) * 3.637978807091713e-12
    return count, mass


@triton.jit
def _lowest_key(
    wanted_count, wanted_mass, lowest, num_above, candidates, weights, high, logits_ptr, row, stride, size, per_unit,
    IS_ROW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A key that divides the tokens as the highest one does above which both wanted amounts lie.

    ``lowest`` is a key that has them, with at most ``num_above`` tokens at it and above.
    """
    # 64 bits: the distance between two keys may take 33.
    has = lowest.to(tl.int64)
    lacks = _key(high).to(tl.int64) + 1
    num_has = num_above
    num_lacks = 0
    step = 0
    # One token between the two: nothing is left to tell apart.
    while (lacks - has > 1) & (num_has - num_lacks > 1):
        # Halving values parts tokens soonest; halving keys is what surely ends.
        middle = has + ((lacks - has) >> 1)
        if step < 24:
            halfway = _key(_value(has) * 0.5 + _value(lacks) * 0.5).to(tl.int64)
            middle = tl.minimum(tl.maximum(halfway, has + 1), lacks - 1)
        step += 1
        count, mass = _above(middle, candidates, weights, high, logits_ptr, row, stride, size, per_unit, IS_ROW, PART)
        if (count >= wanted_count) & (mass >= wanted_mass):
            has = middle
            num_has = count
        else:
            lacks = middle
            num_lacks = count
    return has


@triton.jit
def _floor_key(
    k, p, lowest, count, total, candidates, weights, high, logits_ptr, row, stride, size, per_unit,
    IS_ROW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Key of the least likely token that top-k and top-p keep; ``lowest`` has ``count`` tokens of mass ``total``."""
    floor = lowest.to(tl.int64)
    if k > 0:
        floor = _lowest_key(
            k, 0.0, lowest, count, candidates, weights, high, logits_ptr, row, stride, size, per_unit, IS_ROW, PART
        )
        count, total = _above(
            floor, candidates, weights, high, logits_ptr, row, stride, size, per_unit, IS_ROW, PART
        )  # fmt: skip
    if p < 1.0:
        floor = _lowest_key(
            1, p * total, floor, count, candidates, weights, high, logits_ptr, row, stride, size, per_unit,
            IS_ROW, PART,
        )  # fmt: skip
    return floor


@triton.jit
def _draw_from_row(
    floor, min_p_floor, temperature, logits_ptr, row, stride, size, seeds_ptr, positions_ptr,
    ACCURATE_LOG: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    best = float("-inf")
    token = 0
    for start in range(0, size, PART):
        ids = start + tl.arange(0, PART)
        logits = load_logits(logits_ptr, row, stride, size, ids)
        x = divided(logits, temperature)
        noise = gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG)
        kept = (logits >= _value(floor)) & (x >= min_p_floor)
        highest, best_id = best_of(tl.where(kept, x + noise, float("-inf")), ids, size)
        if highest > best:
            best = highest
            token = best_id
    return token


@triton.jit
def choose(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    scores_ptr, ids_ptr, lows_ptr, masses_ptr, taken_ptr, values_ptr, value_ids_ptr, out_ptr, finite_ptr,
    PART: tl.constexpr, PART_BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
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
    high, token = best_of(tl.where(scores == scores, scores, float("-inf")), ids, size)
    if FILTERED:
        if finite & is_filtered(row, size, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
            temperature = tl.load(temperature_ptr + row)
            k = tl.load(top_k_ptr + row)
            k = tl.where(k < size, k, 0).to(tl.int32)
            p = tl.load(top_p_ptr + row)
            min_p = tl.load(min_p_ptr + row)
            scaled_high = divided(high, temperature)
            min_p_floor = scaled_high + log_of(tl.maximum(min_p, 1e-38), ACCURATE_LOG)
            min_p_floor = tl.where(min_p > 0.0, min_p_floor, float("-inf"))
            total = tl.sum(tl.load(masses_ptr + row * num_parts + parts, mask=parts < num_parts, other=0.0), axis=0)

            num = tl.load(taken_ptr + row * 2 + 1)
            at = tl.arange(0, CANDIDATES)
            found = at < num
            x = tl.load(values_ptr + row * CANDIDATES + at, mask=found, other=float("-inf"))
            x = divided(x, temperature)
            # A count in the high bits and a mass in the low ones: one sum, exact in any order.
            weights = tl.where(found, (tl.exp(x - scaled_high) * 274877906944.0).to(tl.int64) + (1 << 50), 0)
            lowest = tl.min(tl.where(found, x, float("inf")), axis=0)
            count, mass = _above(
                _key(lowest), x, weights, scaled_high, logits_ptr, row, stride, size, 0.0, False, PART
            )  # fmt: skip
            holds_nucleus = ((p < 1.0) & (mass >= p * total)) | ((p >= 1.0) & (min_p_floor >= lowest))
            if (num > 0) & (((k > 0) & (k <= num)) | ((k == 0) & holds_nucleus)):
                floor = _floor_key(
                    k, p, _key(lowest), count, total, x, weights, scaled_high, logits_ptr, row, stride, size, 0.0,
                    False, PART,
                )  # fmt: skip
                of = tl.load(value_ids_ptr + row * CANDIDATES + at, mask=found, other=0x7FFFFFFF)
                kept = found & (x >= _value(floor)) & (x >= min_p_floor)
                noise = gumbel(row, seeds_ptr, positions_ptr, of, ACCURATE_LOG)
                _, token = best_of(tl.where(kept, x + noise, float("-inf")), of, size)
            else:
                low = row_low(lows_ptr, row, num_parts, PART_BLOCK)
                floor = _floor_key(
                    k, p, _key(low), size, total, x, weights, high, logits_ptr, row, stride, size,
                    1.4426950408889634 / temperature, True, PART,
                )  # fmt: skip
                token = _draw_from_row(
                    floor, min_p_floor, temperature, logits_ptr, row, stride, size, seeds_ptr, positions_ptr,
                    ACCURATE_LOG, PART,
                )  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))
    tl.store(finite_ptr + row, finite.to(tl.int8))
