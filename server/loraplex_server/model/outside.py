"""What adapters change outside the layers' linears: embeddings, norms and the head, row by row of a batch.

Adapters that train whole modules, single tokens or LoRA on them are served beside others: the base's result is computed
for all rows, and the rows of such an adapter are computed again from its own weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraplex_adapters.base import ModuleKey
from loraplex_server.kernels.lora_ref import lora_add_ref, lora_expand_ref
from loraplex_server.kernels.norm_ref import rms_norm_ref
from loraplex_server.model.adapters import AdapterLookup, OutsideParts, VocabularyRows
from loraplex_server.model.batch import Segment


@dataclass(frozen=True, slots=True)
class OutsideSegments:
    """The segments of a batch whose adapters change anything outside the layers' linears."""

    parts: tuple[tuple[slice, OutsideParts], ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], adapters: AdapterLookup) -> "OutsideSegments":
        found = ((slice(s.start, s.stop), adapters.outside(s.slot)) for s in segments)
        return cls(tuple((rows, parts) for rows, parts in found if parts is not None))

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Embeddings of every token. Shapes: token_ids [T], weight [V, H] -> [T, H]."""
        if not self.parts:
            return embedding(token_ids, weight)
        # An adapter's own tokens have no row in the base; theirs are put in below.
        hidden = embedding(token_ids.clamp(max=weight.shape[0] - 1), weight)
        for rows, parts in self.parts:
            ids = token_ids[rows]
            if parts.embed is not None:
                _replace_rows(hidden[rows], ids, parts.embed)
            if parts.embed_lora is not None:
                a = parts.embed_lora.a
                shrunk = a.index_select(1, ids.clamp(max=a.shape[1] - 1)).t()
                lora_expand_ref(hidden[rows], shrunk, parts.embed_lora)
        return hidden

    def norm(self, x: Tensor, weight: Tensor, eps: float, module: ModuleKey) -> Tensor:
        """``rms_norm_ref`` with each row's own weight. Shapes: x [T, ..., H]."""
        normed = rms_norm_ref(x, weight, eps)
        for rows, parts in self.parts:
            own = parts.norms.get(module)
            if own is not None:
                normed[rows] = rms_norm_ref(x[rows], own, eps)
        return normed

    def head(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """The base's scores with each row's own head. Shapes: scores [T, V], hidden [T, H] -> [T, at least V].

        Tokens that a row's adapter does not have get the lowest number there is.
        """
        if not self.parts:
            return scores
        num_base, lowest = scores.shape[1], torch.finfo(scores.dtype).min
        width = max(num_base, *(parts.vocab_size for _, parts in self.parts))
        if width > num_base:
            wide = scores.new_full((scores.shape[0], width), lowest)
            wide[:, :num_base] = scores
            scores = wide
        for rows, parts in self.parts:
            if parts.head is not None:
                values = hidden[rows] @ parts.head.values.t()
                scores[rows] = scores[rows].index_copy(1, parts.head.indices.long(), values)
            if parts.head_lora is not None:
                own = scores[rows, : parts.vocab_size]
                lora_add_ref(own, hidden[rows], [(0, own.shape[0], parts.head_lora)])
            scores[rows, parts.vocab_size :] = lowest
        return scores


def _replace_rows(hidden: Tensor, ids: Tensor, rows: VocabularyRows) -> None:
    """Put the adapter's own embeddings where the tokens have one. Shapes: hidden [T, H], ids [T]."""
    if not rows.indices.numel():
        return
    at = torch.searchsorted(rows.indices, ids.int()).clamp(max=rows.indices.shape[0] - 1)
    own = rows.indices[at] == ids
    hidden.copy_(torch.where(own[:, None], rows.values[at], hidden))
