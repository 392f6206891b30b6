"""Decode steps on a GPU: rows that stay on the device, replayed through CUDA graphs, the host one step behind.

A row is one running sequence. What changes from step to step is 16 bytes a row (position, adapter, a new KV block, and
the token where the device does not know it already); a step is one small copy, one graph, one copy back. The next
step can be launched before the tokens of this one are read, because a row's token is taken from where the sampler
left it.
"""

import gc
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from loraplex_server.engine.device_adapters import DeviceAdapters
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.kernels.rows import prepare_rows
from loraplex_server.kernels.rows_ref import ADAPTER, NEW_BLOCK, NUM_COLUMNS, POSITION, TOKEN
from loraplex_server.kernels.sampling import SampleWorkspace, SamplingMode, sample
from loraplex_server.model.fused import DecodeRows, FusedForward, base_alone

# Rows that graphs are captured for; a step runs in the smallest that holds it.
BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_IN_FLIGHT: Final = 2


@dataclass(frozen=True, slots=True)
class LaunchedRows:
    """A step on its way: who gets which row's token, and where the tokens will be."""

    seqs: tuple[tuple[int, Sequence], ...]
    token_ids: Tensor
    finite: Tensor
    done: torch.cuda.Event

    def wait(self) -> list[tuple[Sequence, int, bool]]:
        """Wait for the device: (sequence, token, whether its logits were numbers)."""
        self.done.synchronize()
        token_ids, finite = self.token_ids.tolist(), self.finite.tolist()
        return [(seq, token_ids[row], finite[row]) for row, seq in self.seqs]


class DecodePath:
    """The rows of one engine. ``adapters`` adds their deltas on the device.

    Owned by the engine's thread; everything runs on its current stream.
    """

    def __init__(
        self,
        forward: FusedForward,
        *,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        adapters: DeviceAdapters,
    ) -> None:
        self._forward = forward
        self._adapters = adapters
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._buckets = (*(b for b in BUCKETS if b < max_rows), max_rows)
        width = -(-max_model_len // block_size)

        def on_device(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

        i32, f32 = torch.int32, torch.float32
        self._rows = DecodeRows(
            token_ids=on_device(max_rows),
            positions=on_device(max_rows),
            kv_slots=on_device(max_rows),
            kv_lens=on_device(max_rows, dtype=i32),
            adapters=on_device(max_rows, dtype=i32),
            block_tables=on_device(max_rows, width, dtype=i32),
        )
        self._packed = on_device(max_rows, NUM_COLUMNS, dtype=i32)
        self._sampled = on_device(max_rows)
        self._finite = on_device(max_rows, dtype=torch.bool)
        self._floats = on_device(3, max_rows, dtype=f32)  # temperature, top_p, min_p
        self._ints = on_device(2, max_rows)  # top_k, seeds
        self._workspace = SampleWorkspace.allocate(max_rows=max_rows, vocab_size=vocab_size, device=device)
        self._staged_packed = [pinned(max_rows, NUM_COLUMNS, dtype=i32) for _ in range(_IN_FLIGHT)]
        self._staged_tables = pinned(max_rows, width, dtype=i32)
        self._staged_floats, self._staged_ints = pinned(3, max_rows, dtype=f32), pinned(2, max_rows, dtype=torch.int64)
        self._out_tokens = [pinned(max_rows, dtype=torch.int64) for _ in range(_IN_FLIGHT)]
        self._out_finite = [pinned(max_rows, dtype=torch.bool) for _ in range(_IN_FLIGHT)]
        self._turn = 0
        self._graphs: dict[tuple[int, SamplingMode, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # The rows of now: who, and per row the next position, the slot, and how many steps it may still take.
        self._seqs: list[Sequence | None] = []
        self._row_of: dict[int, int] = {}
        self._position = np.zeros(max_rows, np.int32)
        self._slot = np.full(max_rows, -1, np.int32)
        self._steps_left = np.zeros(max_rows, np.int32)
        self._mode = SamplingMode.GREEDY

    # --- whom it can serve ------------------------------------------------------------------------------------------

    def takes(self, seqs: Rows[Sequence]) -> bool:
        """Whether every one of these can run here: nothing that the host must look at between two tokens."""
        if not seqs or len(seqs) > self._buckets[-1]:
            return False
        return all(self._takes(seq) for seq in seqs)

    def _takes(self, seq: Sequence) -> bool:
        params = seq.request.sampling
        plain = not (params.logit_bias or params.has_penalties) and params.num_logprobs is None
        return plain and seq.num_output >= params.min_tokens and (seq.slot < 0 or self._adapters.fits(seq.slot))

    # --- a step -----------------------------------------------------------------------------------------------------

    def seat(self, seqs: Rows[Sequence]) -> None:
        """Give these sequences the rows, from the first. Their tokens are all known to the host, and their blocks hold
        the next position. Nothing may be in flight."""
        n = len(seqs)
        self._seqs = list(seqs)
        self._row_of = {id(seq): row for row, seq in enumerate(seqs)}
        for row, seq in enumerate(seqs):
            params = seq.request.sampling
            self._position[row] = len(seq.tokens) - 1
            self._slot[row] = seq.slot
            left = min(params.max_tokens - seq.num_output, self._max_model_len - len(seq.tokens))
            self._steps_left[row] = left
            self._staged_tables[row, : len(seq.block_ids)] = torch.tensor(seq.block_ids, dtype=torch.int32)
            self._staged_floats[:, row] = torch.tensor((params.temperature, params.top_p, params.min_p))
            self._staged_ints[:, row] = torch.tensor((params.top_k, seq.seed))
        self._rows.block_tables[:n].copy_(self._staged_tables[:n], non_blocking=True)
        self._floats.copy_(self._staged_floats, non_blocking=True)
        self._ints.copy_(self._staged_ints, non_blocking=True)
        # The staging above is written again by the next seating, which must not overtake these copies.
        torch.cuda.current_stream().synchronize()
        self._adapters.seat([seq.slot for seq in seqs], self._bucket())
        self._mode = _mode_of(seqs)

    def unseat(self, seq: Sequence) -> None:
        """The sequence has ended or left; its row stays empty until the next seating."""
        row = self._row_of.pop(id(seq), None)
        if row is not None:
            self._seqs[row] = None

    def clear(self) -> None:
        """Empty all rows."""
        self._seqs, self._row_of = [], {}

    @property
    def num_seated(self) -> int:
        return len(self._row_of)

    def is_sparse(self) -> bool:
        """True when most rows are empty, so that seating anew would run a smaller graph."""
        return 2 * self.num_seated <= len(self._seqs)

    def live(self) -> list[tuple[int, Sequence]]:
        """Rows that take part in the next step."""
        return [
            (row, seq)
            for row, seq in enumerate(self._seqs)
            if seq is not None and self._steps_left[row] > 0 and seq.status is Status.RUNNING
        ]

    def next_position(self, row: int) -> int:
        """Where the row's next key goes."""
        return int(self._position[row])

    @torch.inference_mode()
    def launch(self, live: Rows[tuple[int, Sequence]], *, fresh: bool) -> LaunchedRows:
        """Start a step of these rows; their blocks hold the next position. ``fresh``: the host knows every row's token
        (the first step after seating); else the device has them from the step before."""
        bucket = self._bucket()
        turn, self._turn = self._turn, (self._turn + 1) % _IN_FLIGHT
        packed = self._staged_packed[turn].numpy()
        packed[:bucket] = -1
        index = np.fromiter((row for row, _ in live), np.int64, len(live))
        positions = self._position[index]
        packed[index, POSITION] = positions
        packed[index, ADAPTER] = self._slot[index]
        for i in np.flatnonzero(positions % self._block_size == 0):
            row, seq = live[int(i)]
            packed[row, NEW_BLOCK] = seq.block_ids[int(positions[i]) // self._block_size]
        if fresh:
            packed[index, TOKEN] = [seq.tokens[-1] for _, seq in live]
        self._position[index] += 1
        self._steps_left[index] -= 1
        self._packed[:bucket].copy_(self._staged_packed[turn][:bucket], non_blocking=True)
        with_adapters = bool((self._slot[index] >= 0).any())
        self._graph(bucket, self._mode, with_adapters).replay()
        token_ids, finite = self._out_tokens[turn], self._out_finite[turn]
        token_ids[:bucket].copy_(self._sampled[:bucket], non_blocking=True)
        finite[:bucket].copy_(self._finite[:bucket], non_blocking=True)
        return LaunchedRows(tuple(live), token_ids, finite, torch.cuda.current_stream().record_event())

    def _bucket(self) -> int:
        return next(b for b in self._buckets if b >= len(self._seqs))

    # --- graphs -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def capture_all(self) -> None:
        """Capture greedy steps of every bucket, largest first so that smaller ones reuse its memory."""
        for bucket in reversed(self._buckets):
            for with_adapters in (False, True):
                self._graph(bucket, SamplingMode.GREEDY, with_adapters)

    @torch.inference_mode()
    def _graph(self, bucket: int, mode: SamplingMode, with_adapters: bool) -> torch.cuda.CUDAGraph:
        key = (bucket, mode, with_adapters)
        if key not in self._graphs:
            # The first run compiles kernels, which a capture cannot. It must not disturb the rows that wait for theirs.
            kept = [t.clone() for t in (self._packed, self._sampled)]
            self._packed.fill_(-1)
            self._run(bucket, mode, with_adapters)
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads copy adapters meanwhile.
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(bucket, mode, with_adapters)
            self._graphs[key] = graph
            for target, source in zip((self._packed, self._sampled), kept, strict=True):
                target.copy_(source)
        return self._graphs[key]

    def _run(self, bucket: int, mode: SamplingMode, with_adapters: bool) -> None:
        rows = DecodeRows(
            self._rows.token_ids[:bucket],
            self._rows.positions[:bucket],
            self._rows.kv_slots[:bucket],
            self._rows.kv_lens[:bucket],
            self._rows.adapters[:bucket],
            self._rows.block_tables[:bucket],
        )
        prepare_rows(
            self._packed[:bucket],
            self._sampled[:bucket],
            rows.block_tables,
            self._block_size,
            rows.token_ids,
            rows.positions,
            rows.kv_slots,
            rows.kv_lens,
            rows.adapters,
        )
        multiply = self._adapters.for_bucket(bucket) if with_adapters else base_alone
        logits = self._forward.decode(rows, self._max_model_len, multiply)
        temperature, top_p, min_p = self._floats[:, :bucket]
        top_k, seeds = self._ints[:, :bucket]
        sample(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            rows.positions + 1,
            self._workspace,
            mode=mode,
            out=self._sampled[:bucket],
            finite=self._finite[:bucket],
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: freeing another engine's graph would spoil a capture."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _mode_of(seqs: Rows[Sequence]) -> SamplingMode:
    params = [seq.request.sampling for seq in seqs]
    if all(p.temperature == 0 for p in params):
        return SamplingMode.GREEDY
    filtered = any(p.temperature and (p.top_k or p.top_p < 1 or p.min_p) for p in params)
    return SamplingMode.FILTERED if filtered else SamplingMode.PLAIN
