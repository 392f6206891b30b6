# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM102
"""The last launch of ``sample``: what a row's filters keep, found by bisection, and the token drawn."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.sampling_device import best_of, gumbel, is_filtered, load_scaled, log_of


@triton.jit
def _key(x):
    """An integer for each float, in the same order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(
    key, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr,
    IS_ROW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Number and mass of the tokens whose key is at least ``key``: of the candidates at hand, or of the whole row."""
    if IS_ROW:
        counts = tl.zeros([PART], tl.int32)
        masses = tl.zeros([PART], tl.float32)
        for start in range(0, size, PART):
            ids = start + tl.arange(0, PART)
            x = load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr)
            inside = (_key(x) >= key) & (ids < size)
            counts += inside.to(tl.int32)
            masses += tl.where(inside, tl.exp(x - high), 0.0)
        count, mass = tl.sum(counts, axis=0), tl.sum(masses, axis=0)
    else:
        both = tl.sum(tl.where(_key(candidates) >= key, weights, 0), axis=0)
        count = (both >> 50).to(tl.int32)
        mass = (both & 0x3FFFFFFFFFFFF).to(tl.float32) * 3.637978807091713e-12
    return count, mass


@triton.jit
def _lowest_key(
    wanted_count, wanted_mass, lowest, num_above,
    candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr,
    IS_ROW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A key that divides the tokens as the highest one does above which both wanted amounts lie.

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
        count, mass = _above(
            middle, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr, IS_ROW, PART
        )
        if (count >= wanted_count) & (mass >= wanted_mass):
            has = middle
            num_has = count
        else:
            lacks = middle
            num_lacks = count
    return has


@triton.jit
def _floor_key(
    k, p, lowest, count, total, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr,
    IS_ROW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Key of the least likely token that top-k and top-p keep; ``lowest`` has ``count`` tokens of mass ``total``."""
    floor = lowest.to(tl.int64)
    if k > 0:
        floor = _lowest_key(
            k, 0.0, lowest, count, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr,
            IS_ROW, PART,
        )  # fmt: skip
        count, total = _above(
            floor, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr, IS_ROW, PART
        )
    if p < 1.0:
        floor = _lowest_key(
            1, p * total, floor, count, candidates, weights, high, logits_ptr, row, stride, size, temperature_ptr,
            IS_ROW, PART,
        )  # fmt: skip
    return floor


@triton.jit
def _draw_from_row(
    floor, min_p_floor, logits_ptr, row, stride, size, temperature_ptr, seeds_ptr, positions_ptr,
    ACCURATE_LOG: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    best = float("-inf")
    token = 0
    for start in range(0, size, PART):
        ids = start + tl.arange(0, PART)
        x = load_scaled(logits_ptr, row, stride, size, ids, temperature_ptr)
        kept = (_key(x) >= floor) & (x >= min_p_floor)
        noisy = tl.where(kept, x + gumbel(row, seeds_ptr, positions_ptr, ids, ACCURATE_LOG), float("-inf"))
        highest, best_id = best_of(noisy, ids, size)
        if highest > best:
            best = highest
            token = best_id
    return token


@triton.jit
def choose(
    logits_ptr, stride, size, num_parts, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    scores_ptr, ids_ptr, masses_ptr, taken_ptr, values_ptr, value_ids_ptr, out_ptr, finite_ptr,
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
            k = tl.load(top_k_ptr + row)
            k = tl.where(k < size, k, 0).to(tl.int32)
            p = tl.load(top_p_ptr + row)
            min_p = tl.load(min_p_ptr + row)
            min_p_floor = high + log_of(tl.maximum(min_p, 1e-38), ACCURATE_LOG)
            min_p_floor = tl.where(min_p > 0.0, min_p_floor, float("-inf"))
            total = tl.sum(tl.load(masses_ptr + row * num_parts + parts, mask=parts < num_parts, other=0.0), axis=0)

            num = tl.load(taken_ptr + row * 2 + 1)
            at = tl.arange(0, CANDIDATES)
            found = at < num
            x = tl.load(values_ptr + row * CANDIDATES + at, mask=found, other=float("-inf"))
            # A count in the high bits and a mass in the low ones: one sum, exact in any order.
            weights = tl.where(found, (tl.exp(x - high) * 274877906944.0).to(tl.int64) + (1 << 50), 0)
            lowest = tl.min(tl.where(found, x, float("inf")), axis=0)
            count, mass = _above(
                _key(lowest), x, weights, high, logits_ptr, row, stride, size, temperature_ptr, False, PART
            )
            holds_nucleus = ((p < 1.0) & (mass >= p * total)) | ((p >= 1.0) & (min_p_floor >= lowest))
            if (num > 0) & (((k > 0) & (k <= num)) | ((k == 0) & holds_nucleus)):
                floor = _floor_key(
                    k, p, _key(lowest), count, total, x, weights, high, logits_ptr, row, stride, size,
                    temperature_ptr, False, PART,
                )  # fmt: skip
                of = tl.load(value_ids_ptr + row * CANDIDATES + at, mask=found, other=0x7FFFFFFF)
                kept = found & (_key(x) >= floor) & (x >= min_p_floor)
                noise = gumbel(row, seeds_ptr, positions_ptr, of, ACCURATE_LOG)
                _, token = best_of(tl.where(kept, x + noise, float("-inf")), of, size)
            else:
                floor = _floor_key(
                    k, p, _key(tl.full([], float("-inf"), tl.float32)), size, total, x, weights, high,
                    logits_ptr, row, stride, size, temperature_ptr, True, PART,
                )  # fmt: skip
                token = _draw_from_row(
                    floor, min_p_floor, logits_ptr, row, stride, size, temperature_ptr, seeds_ptr, positions_ptr,
                    ACCURATE_LOG, PART,
                )  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))
    tl.store(finite_ptr + row, finite.to(tl.int8))
