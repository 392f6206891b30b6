"""Decode steps on a GPU: rows that stay on the device, replayed through CUDA graphs, the host one step behind.

A row is one running sequence. What changes from step to step is 16 bytes a row (position, adapter, a new KV block, and
the token where the device does not know it already); a step is one small copy, one graph, one copy back. The next
step can be launched before the tokens of this one are read, because a row's token is taken from where the sampler
left it.
"""

import gc
import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraplex_server.engine.device_adapters import DeviceAdapters
from loraplex_server.engine.row_sampling import Drawing, DrawnRows, RowSampling
from loraplex_server.engine.sampler import Sampled
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.kernels import nvrtc
from loraplex_server.kernels.nvrtc_build import build_all
from loraplex_server.kernels.rows import prepare_rows
from loraplex_server.kernels.rows_ref import ADAPTER, NEW_BLOCK, NUM_COLUMNS, POSITION, TOKEN
from loraplex_server.kernels.sampling import SamplingMode
from loraplex_server.model.fused import DecodeRows, FusedForward, base_alone

log = logging.getLogger(__name__)

# Rows that graphs are captured for; a step runs in the smallest that holds it.
BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_IN_FLIGHT: Final = 2
_GREEDY: Final = Drawing(SamplingMode.GREEDY, adjusts=False, scores=False)


@dataclass(frozen=True, slots=True)
class LaunchedRows:
    """A step on its way: who gets which row's token, and where the tokens will be."""

    seqs: tuple[tuple[int, Sequence], ...]
    drawn: DrawnRows
    done: torch.cuda.Event

    def wait(self) -> list[tuple[Sequence, Sampled]]:
        """Wait for the device, and read what each sequence drew."""
        self.done.synchronize()
        return self.drawn.read(self.seqs)


class _Variant(NamedTuple):
    """What a graph was captured for."""

    bucket: int
    with_adapters: bool
    drawing: Drawing


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
        eos_ids: frozenset[int],
        dtype: torch.dtype,
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

        i32 = torch.int32
        self._rows = DecodeRows(
            token_ids=on_device(max_rows),
            positions=on_device(max_rows),
            kv_slots=on_device(max_rows),
            kv_lens=on_device(max_rows, dtype=i32),
            adapters=on_device(max_rows, dtype=i32),
            block_tables=on_device(max_rows, width, dtype=i32),
        )
        self._packed = on_device(max_rows, NUM_COLUMNS, dtype=i32)
        self._sampling = RowSampling(
            max_rows=max_rows, vocab_size=vocab_size, eos_ids=eos_ids, dtype=dtype, device=device
        )
        self._staged_packed = [pinned(max_rows, NUM_COLUMNS, dtype=i32) for _ in range(_IN_FLIGHT)]
        self._staged_tables = pinned(max_rows, width, dtype=i32)
        self._turn = 0
        self._graphs: dict[_Variant, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # The rows of now: who, and per row the next position, the slot, and how many steps it may still take.
        self._seqs: list[Sequence | None] = []
        self._row_of: dict[int, int] = {}
        self._position = np.zeros(max_rows, np.int32)
        self._slot = np.full(max_rows, -1, np.int32)
        self._steps_left = np.zeros(max_rows, np.int32)
        self._num_preemptions = np.zeros(max_rows, np.int32)
        self._drawing = _GREEDY

    # --- whom it can serve ------------------------------------------------------------------------------------------

    def takes(self, seqs: Rows[Sequence]) -> bool:
        """Whether every one of these can run here: nothing that the host must look at between two tokens."""
        if not seqs or len(seqs) > self._buckets[-1]:
            return False
        return all(
            self._sampling.takes(seq) and (seq.slot < 0 or self._adapters.fits_rows(seq.slot, len(seqs)))
            for seq in seqs
        )

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
            self._num_preemptions[row] = seq.num_preemptions
            left = min(params.max_tokens - seq.num_output, self._max_model_len - len(seq.tokens))
            self._steps_left[row] = left
            self._staged_tables[row, : len(seq.block_ids)] = torch.tensor(seq.block_ids, dtype=torch.int32)
        self._rows.block_tables[:n].copy_(self._staged_tables[:n], non_blocking=True)
        self._drawing = self._sampling.seat(seqs)
        # The staging above is written again by the next seating, which must not overtake these copies.
        torch.cuda.current_stream().synchronize()
        self._adapters.seat([seq.slot for seq in seqs], self._bucket())

    def holds(self, seqs: Rows[Sequence]) -> bool:
        """Whether these sequences and no others have rows, each at the position that comes next."""
        if self.num_seated != len(seqs) or self.is_sparse():
            return False
        for seq in seqs:
            row = self._row_of.get(id(seq), -1)
            if row < 0 or self._num_preemptions[row] != seq.num_preemptions:
                return False
            if self._position[row] != len(seq.tokens) - 1:
                return False
        return True

    def unseat(self, seq: Sequence) -> None:
        """The sequence has ended or left; its row stays empty until the next seating."""
        row = self._row_of.pop(id(seq), None)
        if row is not None:
            self._seqs[row] = None

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
        self._graph(_Variant(bucket, with_adapters, self._drawing)).replay()
        self._sampling.launched(live, self._drawing)
        drawn = self._sampling.fetch(turn, bucket, self._drawing)
        return LaunchedRows(tuple(live), drawn, torch.cuda.current_stream().record_event())

    def _bucket(self) -> int:
        return next(b for b in self._buckets if b >= len(self._seqs))

    # --- graphs -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def capture_all(self) -> None:
        """Capture greedy steps of every bucket, largest first so that smaller ones reuse its memory.

        Other steps are captured when they first occur; their kernels are compiled here, while processes of their own
        build the greedy steps' CUDA code.
        """
        started = time.perf_counter()
        variants = [
            _Variant(bucket, with_adapters, _GREEDY)
            for bucket in reversed(self._buckets)
            for with_adapters in (False, True)
        ]
        self._packed.fill_(-1)
        with torch.inference_mode(), nvrtc.planning() as builds:
            for variant in variants:
                self._run(variant)
        with ThreadPoolExecutor(1) as pool:
            built = pool.submit(build_all, builds)
            self._sampling.warm_up()
            built.result()
        compiled = time.perf_counter()
        for variant in variants:
            self._graph(variant)
        log.info(
            "decode steps: %d kernels compiled in %.1f s, %d graphs captured in %.1f s",
            len(builds), compiled - started, len(variants), time.perf_counter() - compiled,
        )  # fmt: skip

    @torch.inference_mode()
    def _graph(self, variant: _Variant) -> torch.cuda.CUDAGraph:
        if variant not in self._graphs:
            # The first run compiles kernels, which a capture cannot. It must not disturb the rows that wait for theirs.
            kept = [t.clone() for t in (self._packed, self._sampling.token_ids)]
            self._packed.fill_(-1)
            self._run(variant)
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads copy adapters meanwhile.
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(variant)
            self._graphs[variant] = graph
            for target, source in zip((self._packed, self._sampling.token_ids), kept, strict=True):
                target.copy_(source)
        return self._graphs[variant]

    def _run(self, variant: _Variant) -> None:
        bucket = variant.bucket
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
            self._sampling.token_ids[:bucket],
            rows.block_tables,
            self._block_size,
            rows.token_ids,
            rows.positions,
            rows.kv_slots,
            rows.kv_lens,
            rows.adapters,
        )
        multiply = self._adapters.for_bucket(bucket) if variant.with_adapters else base_alone
        logits = self._forward.decode(rows, self._max_model_len, multiply)
        self._sampling.draw(logits, rows.positions, rows.kv_lens, variant.drawing)


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
