"""What an adapter does to a linear, in plain torch: the definition that faster kernels are checked against.

The linears of a decoder layer that share an input are fused into one *group* (q/k/v, gate/up; o and down stand
alone). An adapter's factors for one group at one layer are a ``GroupDelta``: the A rows of the group's parts stacked,
so that one product shrinks the input for all of them, and one B for each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PartDelta:
    """The B factor of one linear inside a fused group.

    Shapes: b [N_part, R_part]; columns ``[col_start, col_stop)`` of the group's output, rows
    ``[rank_start, rank_stop)`` of the group's stacked A. Scaling is already folded into b.
    """

    col_start: int
    col_stop: int
    rank_start: int
    rank_stop: int
    b: Tensor


@dataclass(frozen=True, slots=True)
class GroupDelta:
    """One adapter's factors for one fused group of linears at one layer: a [R, K] and the parts' B.

    The group's output becomes ``factor * (base + delta) + shift``, where base includes the base's bias. factor and
    shift [N] are float32, both or neither there: DoRA has a factor for each output, trained biases a shift (which also
    takes out what the factor did to the base's bias). Without them the output is ``base + delta``.
    """

    a: Tensor
    parts: tuple[PartDelta, ...]
    factor: Tensor | None = None
    shift: Tensor | None = None


def lora_add_ref(out: Tensor, x: Tensor, segments: Sequence[tuple[int, int, GroupDelta]]) -> None:
    """Apply each segment's adapter to ``out`` in place; defines ``lora_add``.

    Shapes: out [T, N], x [T, K]; a segment (start, stop, delta) covers rows start..stop of both. Rows outside every
    segment belong to the base and are left alone.
    Source: Punica's SGMV (arXiv 2310.18547), as one pair of products per segment.
    """
    for start, stop, delta in segments:
        lora_expand_ref(out[start:stop], x[start:stop] @ delta.a.t(), delta)


def lora_expand_ref(out: Tensor, shrunk: Tensor, delta: GroupDelta) -> None:
    """The second half of ``lora_add_ref``, from the shrunk rows. Shapes: out [T, N], shrunk [T, R]."""
    if delta.factor is None or delta.shift is None:
        for part in delta.parts:
            out[:, part.col_start : part.col_stop].addmm_(shrunk[:, part.rank_start : part.rank_stop], part.b.t())
        return
    wide = out.float()
    for part in delta.parts:
        product = shrunk[:, part.rank_start : part.rank_stop].float() @ part.b.t().float()
        wide[:, part.col_start : part.col_stop] += product
    out.copy_(wide.mul_(delta.factor).add_(delta.shift))
