"""Logits to token ids and log-probabilities, for the rows of one step."""

import importlib.util
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_server.engine.sequence import SamplingParams, Sequence, TokenLogprob
from loraplex_server.kernels.sampling_logprobs_ref import logprobs_ref
from loraplex_server.kernels.sampling_ref import sample_ref


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome. ``finite`` is False when the logits held NaN, so that the token means nothing."""

    token_id: int
    logprob: TokenLogprob | None
    finite: bool


@dataclass(frozen=True, slots=True)
class Drawn:
    """Device tensors of one step's sampling, before they are read."""

    token_ids: Tensor
    finite: Tensor
    logprob_rows: tuple[int, ...]
    chosen: Tensor | None
    top_values: Tensor | None
    top_ids: Tensor | None


class Sampler:
    """Applies each sequence's own parameters; rows never influence each other."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def draw(self, logits: Tensor, seqs: Rows[Sequence]) -> Drawn:
        """Start sampling: logits [R, V] float32, one row for each sequence. Nothing is read back yet."""
        adjusted = self._adjust(logits, seqs)
        params = [seq.request.sampling for seq in seqs]
        token_ids = adjusted.argmax(dim=1) if all(p.temperature == 0 for p in params) else _draw(adjusted, seqs)
        finite = ~torch.isnan(logits.amax(dim=1))
        rows = tuple(i for i, p in enumerate(params) if p.num_logprobs is not None)
        if not rows:
            return Drawn(token_ids, finite, (), None, None, None)
        k = max(params[i].num_logprobs or 0 for i in rows)
        chosen, top_values, top_ids = logprobs_ref(logits[list(rows)], token_ids[list(rows)], k)
        return Drawn(token_ids, finite, rows, chosen, top_values, top_ids)

    def read(self, drawn: Drawn, seqs: Rows[Sequence]) -> list[Sampled]:
        """Wait for the device and hand out the rows' tokens."""
        token_ids = drawn.token_ids.tolist()
        finite = drawn.finite.tolist()
        found: dict[int, TokenLogprob] = {}
        if drawn.chosen is not None and drawn.top_values is not None and drawn.top_ids is not None:
            wanted = [seqs[i].request.sampling.num_logprobs or 0 for i in drawn.logprob_rows]
            ids = [token_ids[i] for i in drawn.logprob_rows]
            entries = token_logprobs(ids, drawn.chosen, drawn.top_values, drawn.top_ids, wanted)
            found = dict(zip(drawn.logprob_rows, entries, strict=True))
        return [Sampled(token, found.get(i), finite[i]) for i, token in enumerate(token_ids)]

    def _adjust(self, logits: Tensor, seqs: Rows[Sequence]) -> Tensor:
        """Bias, penalties and minimum length, on a copy where any row asks for them."""
        touched = [i for i, seq in enumerate(seqs) if is_adjusted(seq)]
        if not touched:
            return logits
        logits = logits.clone()
        for i in touched:
            self._adjust_row(logits[i], seqs[i])
        return logits

    def _adjust_row(self, row: Tensor, seq: Sequence) -> None:
        params = seq.request.sampling
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            row[torch.tensor(ids, device=row.device)] += torch.tensor(values, dtype=row.dtype, device=row.device)
        if params.has_penalties:
            _penalize(row, seq, params)
        if seq.num_output < params.min_tokens:
            forbidden = [*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids)]
            if forbidden:
                row[torch.tensor(forbidden, device=row.device)] = float("-inf")


def token_logprobs(
    token_ids: Rows[int], chosen: Tensor, top_values: Tensor, top_ids: Tensor, wanted: Rows[int]
) -> list[TokenLogprob]:
    """Read ``logprobs_ref``'s tensors back, each row with its own number of alternatives."""
    values, ids = top_values.tolist(), top_ids.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[i][:k], values[i][:k], strict=True)))
        for i, (token, logprob, k) in enumerate(zip(token_ids, chosen.tolist(), wanted, strict=True))
    ]


def is_adjusted(seq: Sequence) -> bool:
    """Whether the sequence's next token is drawn from other logits than the model's."""
    params = seq.request.sampling
    return bool(params.logit_bias) or params.has_penalties or seq.num_output < params.min_tokens


def _penalize(row: Tensor, seq: Sequence, params: SamplingParams) -> None:
    """Repetition over prompt and answer; presence and frequency over the answer, as the OpenAI API defines them."""
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(seq.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if seq.num_output and (params.presence_penalty or params.frequency_penalty):
        counted = Counter(seq.output_ids)
        ids = torch.tensor(list(counted), device=row.device)
        counts = torch.tensor(list(counted.values()), device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: Tensor, seqs: Rows[Sequence]) -> Tensor:
    device = logits.device
    params = [seq.request.sampling for seq in seqs]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    columns = (
        column([p.temperature for p in params]),
        column([p.top_k for p in params], torch.int64),
        column([p.top_p for p in params]),
        column([p.min_p for p in params]),
        column([seq.seed for seq in seqs], torch.int64),
        column([len(seq.tokens) for seq in seqs], torch.int64),
    )
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return sample_ref(logits, *columns)
    from loraplex_server.kernels.sampling import SampleWorkspace, sample

    workspace = SampleWorkspace.allocate(max_rows=len(seqs), vocab_size=logits.shape[1], device=device)
    return sample(logits, *columns, workspace)
