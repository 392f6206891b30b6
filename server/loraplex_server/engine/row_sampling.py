"""How the tokens of decode rows are drawn: every row's own parameters on the device, and what a captured step does.

A step costs what its rows ask for. ``Drawing`` says so for all of them together: whether any row has a temperature,
filters, biases or penalties, or wants log-probabilities; a graph is captured for each such answer that occurs. Counts
of a row's tokens live on the device and grow with every draw, so that penalties need no word from the host either.
"""

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from loraplex_server.engine.sampler import Sampled, is_adjusted
from loraplex_server.engine.sequence import SamplingParams, Sequence, TokenLogprob
from loraplex_server.kernels.penalties import add_bias, count_tokens, forbid, penalize
from loraplex_server.kernels.sampling import SampleWorkspace, SamplingMode, sample
from loraplex_server.kernels.sampling_logprobs import NUM_TOP, LogprobWorkspace, logprobs

# Biases and forbidden tokens that a row has room for; the API allows 300, and 64 stop tokens beside the model's own.
MAX_BIASES: Final = 512
MAX_FORBIDDEN: Final = 128

# Temperature, top_p, min_p, repetition, presence and frequency of a row that costs nothing.
_ASKS_NOTHING: Final = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


class Drawing(NamedTuple):
    """What a step's rows ask for together. ``adjusts``: biases, penalties or a minimum length; ``scores``:
    log-probabilities."""

    mode: SamplingMode
    adjusts: bool
    scores: bool


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """One step's tokens in pinned memory, to be read once the device has got there.

    Shapes: token_ids [R] int64, finite [R] bool; with log-probabilities chosen [R] and top_values [R, 20] float32, and
    top_ids [R, 20] int32.
    """

    token_ids: Tensor
    finite: Tensor
    chosen: Tensor
    top_values: Tensor
    top_ids: Tensor

    def read(self, rows: Rows[tuple[int, Sequence]]) -> list[tuple[Sequence, Sampled]]:
        """What the given rows drew."""
        token_ids, finite = self.token_ids.tolist(), self.finite.tolist()
        return [
            (seq, Sampled(token_ids[row], self._logprob(row, token_ids[row], seq.request.sampling), finite[row]))
            for row, seq in rows
        ]

    def _logprob(self, row: int, token_id: int, params: SamplingParams) -> TokenLogprob | None:
        k = params.num_logprobs
        if k is None:
            return None
        top = zip(self.top_ids[row, :k].tolist(), self.top_values[row, :k].tolist(), strict=True)
        return TokenLogprob(token_id, float(self.chosen[row]), tuple(top))


class RowSampling:
    """The sampling state of one engine's decode rows. Owned by its thread; runs on its current stream.

    ``dtype`` is that of the model's logits.
    """

    def __init__(
        self, *, max_rows: int, vocab_size: int, eos_ids: frozenset[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._eos_ids = eos_ids
        self._dtype = dtype
        self._vocab_size = vocab_size

        def on_device(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

        i16, i32, i64, f32 = torch.int16, torch.int32, torch.int64, torch.float32
        self.token_ids = on_device(max_rows, dtype=i64)
        self._finite = on_device(max_rows, dtype=torch.bool)
        self._workspace = SampleWorkspace.allocate(max_rows=max_rows, vocab_size=vocab_size, device=device)
        # temperature, top_p, min_p, repetition, presence, frequency; top_k, seed
        self._floats, self._staged_floats = on_device(6, max_rows, dtype=f32), pinned(6, max_rows, dtype=f32)
        self._ints, self._staged_ints = on_device(2, max_rows, dtype=i64), pinned(2, max_rows, dtype=i64)
        self._adjusted = on_device(max_rows, vocab_size, dtype=f32)
        self._in_prompt = on_device(max_rows, vocab_size, dtype=torch.bool)
        self._counts = on_device(max_rows, vocab_size, dtype=i16)
        # Whose tokens a row of the counts holds, and how many.
        self._counted: list[tuple[Sequence | None, int]] = [(None, 0)] * max_rows
        self._biases = (on_device(max_rows, MAX_BIASES, dtype=i32), on_device(max_rows, MAX_BIASES, dtype=f32))
        self._forbidden = (on_device(max_rows, MAX_FORBIDDEN, dtype=i32), on_device(max_rows, dtype=i32))
        self._logprob_workspace = LogprobWorkspace.allocate(max_rows=max_rows, vocab_size=vocab_size, device=device)
        self._scores = (
            on_device(max_rows, dtype=f32),
            on_device(max_rows, NUM_TOP, dtype=f32),
            on_device(max_rows, NUM_TOP, dtype=i32),
        )
        self._out = [
            DrawnRows(
                pinned(max_rows, dtype=i64),
                pinned(max_rows, dtype=torch.bool),
                pinned(max_rows, dtype=f32),
                pinned(max_rows, NUM_TOP, dtype=f32),
                pinned(max_rows, NUM_TOP, dtype=i32),
            )
            for _ in range(2)
        ]

    def takes(self, seq: Sequence) -> bool:
        """Whether everything this sequence asks for is drawn on the device."""
        params = seq.request.sampling
        few = len(params.logit_bias) <= MAX_BIASES and len(self._forbidden_of(params)) <= MAX_FORBIDDEN
        return few and (params.num_logprobs or 0) <= min(NUM_TOP, self._vocab_size)

    # --- seating ----------------------------------------------------------------------------------------------------

    def seat(self, seqs: Rows[Sequence]) -> Drawing:
        """These sequences take the rows, from the first; all their tokens are known to the host, and nothing is in
        flight. The copies have left the staging memory once the stream was waited for."""
        for row, seq in enumerate(seqs):
            p = seq.request.sampling
            floats = (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            self._staged_floats[:, row] = torch.tensor(floats)
            self._staged_ints[:, row] = torch.tensor((p.top_k, seq.seed))
        self._staged_floats[:, len(seqs) :] = torch.tensor(_ASKS_NOTHING)[:, None]
        self._floats.copy_(self._staged_floats, non_blocking=True)
        self._ints.copy_(self._staged_ints, non_blocking=True)
        drawing = drawing_of(seqs)
        if drawing.adjusts:
            self._seat_tables(seqs)
            for row, seq in enumerate(seqs):
                if seq.request.sampling.has_penalties:
                    self._seat_counts(row, seq)
                else:
                    # The row's counts grow with every draw, and are nobody's.
                    self._counted[row] = (None, 0)
        return drawing

    def _seat_tables(self, seqs: Rows[Sequence]) -> None:
        bias_ids = torch.full((len(seqs), MAX_BIASES), -1, dtype=torch.int32)
        bias_values = torch.zeros(len(seqs), MAX_BIASES)
        forbidden = torch.full((len(seqs), MAX_FORBIDDEN), -1, dtype=torch.int32)
        until = torch.zeros(len(seqs), dtype=torch.int32)
        for row, seq in enumerate(seqs):
            params = seq.request.sampling
            if params.logit_bias:
                ids, values = zip(*params.logit_bias, strict=True)
                bias_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
                bias_values[row, : len(ids)] = torch.tensor(values)
            if params.min_tokens:
                ends = self._forbidden_of(params)
                forbidden[row, : len(ends)] = torch.tensor(ends, dtype=torch.int32)
                # A draw at position p makes output token p + 2 - num_prompt.
                until[row] = seq.num_prompt + params.min_tokens - 1
        targets = (*self._biases, *self._forbidden)
        for target, table in zip(targets, (bias_ids, bias_values, forbidden, until), strict=True):
            target[: len(seqs)].copy_(table)

    def _seat_counts(self, row: int, seq: Sequence) -> None:
        held, num_tokens = self._counted[row]
        if held is seq and num_tokens == len(seq.tokens):
            return
        device = self.token_ids.device
        self._in_prompt[row].zero_()
        self._in_prompt[row, torch.tensor(sorted(set(seq.request.prompt_ids)), device=device)] = True
        self._counts[row].zero_()
        if seq.num_output:
            counted = Counter(seq.output_ids)
            ids = torch.tensor(list(counted), device=device)
            counts = torch.tensor(list(counted.values())).clamp(max=32767)
            self._counts[row, ids] = counts.to(device, torch.int16)
        self._counted[row] = (seq, len(seq.tokens))

    def _forbidden_of(self, params: SamplingParams) -> list[int]:
        """Tokens that would end the answer."""
        if not params.min_tokens:
            return []
        return sorted({*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids)})

    # --- a step -----------------------------------------------------------------------------------------------------

    def draw(self, logits: Tensor, positions: Tensor, kv_lens: Tensor, drawing: Drawing) -> None:
        """Draw a token for each row of ``logits`` [B, V]; captured into graphs. Rows without a sequence draw anything.

        Shapes: positions [B] int64, of the tokens that the logits came from; kv_lens [B] int32, 0 = no sequence.
        """
        n = logits.shape[0]
        temperature, top_p, min_p, repetition, presence, frequency = self._floats[:, :n]
        top_k, seeds = self._ints[:, :n]
        source = logits
        if drawing.adjusts:
            source = self._adjusted[:n]
            source.copy_(logits)
            add_bias(source, self._biases[0][:n], self._biases[1][:n])
            penalize(source, self._in_prompt[:n], self._counts[:n], repetition, presence, frequency)
            forbid(source, self._forbidden[0][:n], self._forbidden[1][:n], positions)
        drawn = self.token_ids[:n]
        sample(
            source, temperature, top_k, top_p, min_p, seeds, positions + 1, self._workspace,
            mode=drawing.mode, out=drawn, finite=self._finite[:n],
        )  # fmt: skip
        if drawing.adjusts:
            count_tokens(self._counts[:n], drawn, kv_lens)
        if drawing.scores:
            logprobs(logits, drawn, self._logprob_workspace, *(part[:n] for part in self._scores))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what any row may ask for, on one row that nobody has."""
        device = self.token_ids.device
        logits = torch.zeros(1, self._vocab_size, dtype=self._dtype, device=device)
        nobody = torch.zeros(1, dtype=torch.int64, device=device)
        for mode in SamplingMode:
            for adjusts in (False, True):
                self.draw(logits, nobody, nobody.int(), Drawing(mode, adjusts, scores=True))

    def launched(self, rows: Rows[tuple[int, Sequence]], drawing: Drawing) -> None:
        """A step of these rows is on its way: their counts grow by what it draws."""
        if drawing.adjusts:
            for row, seq in rows:
                held, num_tokens = self._counted[row]
                if held is seq:
                    self._counted[row] = (seq, num_tokens + 1)

    def fetch(self, turn: int, bucket: int, drawing: Drawing) -> DrawnRows:
        """Start copying what a step drew to the host; ``turn`` 0 or 1 says into which of two places."""
        out = self._out[turn]
        out.token_ids[:bucket].copy_(self.token_ids[:bucket], non_blocking=True)
        out.finite[:bucket].copy_(self._finite[:bucket], non_blocking=True)
        if drawing.scores:
            for target, source in zip((out.chosen, out.top_values, out.top_ids), self._scores, strict=True):
                target[:bucket].copy_(source[:bucket], non_blocking=True)
        return out


def drawing_of(seqs: Rows[Sequence]) -> Drawing:
    """What these sequences ask for together."""
    params = [seq.request.sampling for seq in seqs]
    mode = SamplingMode.GREEDY
    if any(p.temperature for p in params):
        filtered = any(p.temperature and (p.top_k or p.top_p < 1 or p.min_p) for p in params)
        mode = SamplingMode.FILTERED if filtered else SamplingMode.PLAIN
    adjusts = any(is_adjusted(seq) for seq in seqs)
    return Drawing(mode, adjusts, any(p.num_logprobs is not None for p in params))
