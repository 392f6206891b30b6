"""Which tokens run in the next step: admit, chunk prefill, preempt, and share the engine fairly across adapters.

Decoding sequences come first, then prefills that have started, then new ones. Adapters (and the base, which counts
as one) are served by least service received so far, so that a flood for one adapter cannot starve another's single
request.
Source: the virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588), counted per
adapter, with recompute-preemption when an adapter has waited long for a place.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from loraplex_server.engine.blocks import BlockPool
from loraplex_server.engine.messages import Failure
from loraplex_server.engine.residency import AdapterLoadError, AdapterResidency
from loraplex_server.engine.sequence import Sequence, Status

DEFAULT_MIXED_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + length)`` of a sequence, to be computed in one step."""

    seq: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """True when this chunk reaches the end of what is known, so that the next token is sampled."""
        return self.start + self.length == len(self.seq.tokens)

    @property
    def decodes(self) -> bool:
        """True for a token that the sequence sampled last, and needs nothing but its successor."""
        return self.length == 1 and self.start >= self.seq.num_prompt


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work, ordered by adapter slot so that each adapter's rows stand together."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_running sequences at once, max_batched_tokens a step, and how long an adapter without any running sequence
    waits before a place is taken for it from the adapter that holds most. Where sequences that decode wait for a step's
    prompts, these have at most max_mixed_tokens."""

    max_running: int
    max_batched_tokens: int
    max_mixed_tokens: int = DEFAULT_MIXED_TOKENS
    fair_wait_s: float = 1.0


@dataclass(slots=True)
class _Line:
    """The requests of one adapter: those waiting, how many run, and the service it has had (tokens)."""

    waiting: deque[Sequence] = field(default_factory=deque)
    num_running: int = 0
    service: float = 0.0

    @property
    def turn(self) -> tuple[float, float]:
        """The lower, the sooner its next request is admitted."""
        return self.service, self.waiting[0].arrival_s


class Scheduler:
    """Owns which sequences wait and run. Values in (``now_s``), a Plan out."""

    def __init__(self, blocks: BlockPool, residency: AdapterResidency, limits: SchedulerLimits) -> None:
        self._blocks = blocks
        self._residency = residency
        self._limits = limits
        self._lines: dict[str, _Line] = {}
        self.running: list[Sequence] = []
        self.num_waiting = 0
        self._out_of_blocks = False
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0

    # --- coming and going -------------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        key = seq.fairness_key
        line = self._lines.get(key)
        if line is None:
            # A newcomer starts level with the least served, or an idle adapter could save up service forever.
            level = min((other.service for other in self._lines.values()), default=0.0)
            line = self._lines[key] = _Line(service=level)
        line.waiting.append(seq)
        self.num_waiting += 1
        if seq.request.adapter is not None:
            self._residency.expect(seq.request.adapter)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds."""
        line = self._lines[seq.fairness_key]
        self._out_of_blocks = False
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq.status is Status.WAITING:
            line.waiting.remove(seq)
            self.num_waiting -= 1
            if seq.request.adapter is not None:
                self._residency.dismiss(seq.request.adapter)
        seq.status = Status.FINISHED
        if not line.waiting and line.num_running == 0:
            del self._lines[seq.fairness_key]

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """(adapter digest or "", running, waiting) of every adapter with requests."""
        for key, line in self._lines.items():
            yield key, line.num_running, len(line.waiting)

    def has_requests_for(self, digest: str) -> bool:
        return digest in self._lines

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    def could_admit(self) -> bool:
        """Whether a schedule now might start a waiting sequence (or fail it)."""
        if self.num_waiting == 0 or self._out_of_blocks or len(self.running) >= self._limits.max_running:
            return False
        ready = (key == "" or self._residency.is_settled(key) for key, line in self._lines.items() if line.waiting)
        return any(ready)

    def charge(self, seqs: Iterable[Sequence]) -> None:
        """Count one token of service for each."""
        for seq in seqs:
            self._lines[seq.fairness_key].service += 1

    # --- one step ---------------------------------------------------------------------------------------------------

    def decoding(self) -> list[Sequence]:
        """The running sequences that need one token computed."""
        return [seq for seq in self.running if seq.num_uncomputed == 1]

    def schedule(self, now_s: float, *, bounded: bool = True) -> tuple[Plan, list[tuple[Sequence, Failure]]]:
        """The next step, and the waiting sequences whose adapter could not be loaded.

        ``bounded``: sequences that decode wait for the prompts in it, whose tokens are therefore bounded.
        """
        budget = self._limits.max_batched_tokens
        if bounded and (num_decoding := len(self.decoding())):
            budget = min(budget, num_decoding + self._limits.max_mixed_tokens)
        chunks: dict[int, Chunk] = {}
        # Decodes first: a long prompt must not delay everybody's next token.
        for seq in sorted(self.running, key=lambda s: (s.num_uncomputed > 1, s.arrival_s)):
            if budget == 0:
                break
            if seq.status is not Status.RUNNING:  # preempted by an earlier one in this loop
                continue
            length = min(seq.num_uncomputed, budget)
            if self._make_blocks(seq, seq.num_computed + length, chunks):
                chunks[id(seq)] = Chunk(seq, seq.num_computed, length)
                budget -= length
        failed = self._admit(chunks, budget, now_s)
        self._residency.expose()
        ordered = sorted(chunks.values(), key=lambda chunk: chunk.seq.slot)
        for chunk in ordered:
            self._lines[chunk.seq.fairness_key].service += chunk.length
        return Plan(tuple(ordered)), failed

    def _make_blocks(self, seq: Sequence, num_tokens: int, chunks: dict[int, Chunk]) -> bool:
        while not self._blocks.grow(seq, num_tokens):
            victim = max(self.running, key=lambda s: s.arrival_s)
            chunks.pop(id(victim), None)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._lines[seq.fairness_key].waiting.appendleft(seq)
        self.num_waiting += 1
        if seq.request.adapter is not None:
            self._residency.expect(seq.request.adapter)

    def _give_back(self, seq: Sequence) -> None:
        self._blocks.release(seq)
        self._lines[seq.fairness_key].num_running -= 1
        if seq.slot >= 0:
            assert seq.request.adapter is not None
            self._residency.release(seq.request.adapter)
            seq.slot = -1

    def _admit(self, chunks: dict[int, Chunk], budget: int, now_s: float) -> list[tuple[Sequence, Failure]]:
        failed: list[tuple[Sequence, Failure]] = []
        self._out_of_blocks = False
        # By service received, then by who has waited longest. A line that cannot go on in this step leaves.
        open_lines = self._open_lines(now_s)
        while budget > 0 and open_lines:
            key = open_lines[0][-1]
            line = self._lines[key]
            seq = line.waiting[0]
            waited_long = line.num_running == 0 and now_s - seq.arrival_s > self._limits.fair_wait_s
            full = len(self.running) >= self._limits.max_running
            if full and not waited_long:
                break
            try:
                admitted = self._hold_adapter(seq, urgent=waited_long)
            except AdapterLoadError as error:
                failed += [(waiting, error.failure) for waiting in line.waiting]
                heapq.heappop(open_lines)
                continue
            if not admitted:
                heapq.heappop(open_lines)
                if waited_long and self._residency.lacks_room(key):
                    # Let the adapters in use drain instead of refilling their places.
                    open_lines = [entry for entry in open_lines if entry[-1] == ""]
                continue
            if full and not self._yield_place(chunks):
                self._let_adapter_go(seq)
                break
            self._blocks.attach_prefix(seq)
            length = min(seq.num_uncomputed, budget)
            if not self._blocks.grow(seq, seq.num_computed + length):
                self._blocks.release(seq)
                self._let_adapter_go(seq)
                self._out_of_blocks = True
                break
            self._start(seq, line, now_s)
            chunks[id(seq)] = Chunk(seq, seq.num_computed, length)
            budget -= length
            if line.waiting:
                heapq.heapreplace(open_lines, (*line.turn, key))
            else:
                heapq.heappop(open_lines)
        return failed

    def _open_lines(self, now_s: float) -> list[tuple[float, float, str]]:
        """A heap of the lines that wait, by ``turn``; of a full batch's, those alone that have waited for long."""
        lines = self._lines.items()
        if len(self.running) < self._limits.max_running:
            found = [(*line.turn, key) for key, line in lines if line.waiting]
        else:
            since_s = now_s - self._limits.fair_wait_s
            found = [
                (*line.turn, key)
                for key, line in lines
                if line.num_running == 0 and line.waiting and line.waiting[0].arrival_s < since_s
            ]
        heapq.heapify(found)
        return found

    def _yield_place(self, chunks: dict[int, Chunk]) -> bool:
        """Preempt the newest sequence of the adapter that runs most, if it runs more than one."""
        holder = max(self._lines.values(), key=lambda line: line.num_running)
        if holder.num_running < 2:
            return False
        candidates = [s for s in self.running if self._lines[s.fairness_key] is holder]
        victim = max(candidates, key=lambda s: s.arrival_s)
        chunks.pop(id(victim), None)
        self._preempt(victim)
        return True

    def _hold_adapter(self, seq: Sequence, *, urgent: bool) -> bool:
        if seq.request.adapter is None:
            seq.slot = -1
            return True
        slot = self._residency.acquire(seq.request.adapter, urgent=urgent)
        if slot is None:
            return False
        seq.slot = slot
        return True

    def _let_adapter_go(self, seq: Sequence) -> None:
        if seq.request.adapter is not None:
            self._residency.release(seq.request.adapter)
            seq.slot = -1

    def _start(self, seq: Sequence, line: _Line, now_s: float) -> None:
        line.waiting.popleft()
        self.num_waiting -= 1
        if seq.request.adapter is not None:
            self._residency.dismiss(seq.request.adapter)
        line.num_running += 1
        self.running.append(seq)
        seq.status = Status.RUNNING
        self.prefix_query_tokens += len(seq.tokens)
        self.prefix_hit_tokens += seq.num_computed
        if seq.started_s is None:
            seq.started_s = now_s
            seq.num_cached = seq.num_computed
