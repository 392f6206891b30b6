"""What happens in one step: schedule and run, or, while nothing but decoding goes on, launch ahead of what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from loraplex_server.engine.blocks import BlockPool
from loraplex_server.engine.messages import Failure
from loraplex_server.engine.runner import Runner, StepResult, UnderWay
from loraplex_server.engine.sampler import Sampled
from loraplex_server.engine.scheduler import Plan, Scheduler
from loraplex_server.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from loraplex_server.engine.decode_path import DecodePath, LaunchedRows

# Steps launched ahead of a schedule while others wait for a place, so that fairness has its say.
_MOST_STEPS_AHEAD = 32


class StepSize(NamedTuple):
    """Tokens that a step computed."""

    num_prefill: int
    num_decode: int


class Stepper:
    """Runs steps on one runner and, where there is one, on a decode path.

    ``on_token`` gets every new token, ``on_failure`` every sequence that cannot go on; both may retire the sequence.
    Prompts beside rows that decode go through the layers a few at a time, with a step of the rows in between: as many
    layers as take no longer than all of them would for ``mixed_tokens``.
    """

    def __init__(
        self,
        runner: Runner,
        path: DecodePath | None,
        scheduler: Scheduler,
        blocks: BlockPool,
        *,
        mixed_tokens: int,
        on_token: Callable[[Sequence, Sampled], None],
        on_failure: Callable[[Sequence, Failure], None],
    ) -> None:
        self._runner = runner
        self._path = path
        self._scheduler = scheduler
        self._blocks = blocks
        self._mixed_tokens = mixed_tokens
        self._on_token = on_token
        self._on_failure = on_failure
        self._in_flight: LaunchedRows | None = None
        self._under_way: UnderWay | None = None
        self._steps_ahead = 0

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._in_flight)

    def step(self, now_s: float) -> StepSize:
        """One step. Failures go to ``on_failure``; nothing is raised."""
        if self._under_way is not None:
            return self._go_on(self._under_way)
        return self._step_ahead() or self._step_planned(now_s)

    def retire(self, seq: Sequence) -> None:
        """The sequence runs no longer, whatever is in flight."""
        if self._path is not None:
            self._path.unseat(seq)
        if self._under_way is not None:
            self._under_way.drop(seq)

    def close(self) -> None:
        """Give back what the device holds for steps."""
        self._in_flight = self._under_way = None
        if self._path is not None:
            self._path.close()

    # --- scheduled steps --------------------------------------------------------------------------------------------

    def _step_planned(self, now_s: float) -> StepSize:
        num_read = self._read_in_flight()
        decoding = self._scheduler.decoding()
        # Where rows decode between the layers of prompts, these need not be cut short for them.
        between = self._runner.goes_by_layers and self._path is not None and self._path.takes(decoding)
        plan, failed = self._scheduler.schedule(now_s, bounded=not between)
        for seq, failure in failed:
            self._on_failure(seq, failure)
        decoding = [chunk.seq for chunk in plan.chunks if chunk.decodes]
        if self._path is not None and self._path.takes(decoding):
            self._start_rows(self._path, decoding)
            plan = Plan(tuple(chunk for chunk in plan.chunks if not chunk.decodes))
        if not plan.chunks:
            return StepSize(0, num_read)
        try:
            self._under_way = self._runner.begin(plan)
        except Exception as error:
            self._give_up(plan, error)
            return StepSize(0, num_read)
        size = self._go_on(self._under_way)
        return StepSize(size.num_prefill, size.num_decode + num_read)

    def _go_on(self, under_way: UnderWay) -> StepSize:
        """Queue the plan's next layers, then the rows' next step; hand out the tokens of their step before."""
        plan, rows, num_done = under_way.plan, self._in_flight, under_way.num_done
        share = self._mixed_tokens * under_way.num_layers // plan.num_tokens if rows else under_way.num_layers
        num_read, num_decode = 0, sum(chunk.decodes for chunk in plan.chunks)
        try:
            if not under_way.advance(max(1, share)):
                before = self._launch_ahead()
                num_read = self._read_rows(before) if before else self._read_in_flight()
                num_layers = under_way.num_done - num_done
                return StepSize(plan.num_tokens * num_layers // under_way.num_layers, num_read)
            launched = self._runner.launch(under_way)
            num_read = self._read_in_flight()
            result = self._runner.collect(launched)
        except Exception as error:  # one step's failure must not take the engine down
            self._under_way = None
            self._give_up(plan, error)
        else:
            self._under_way = None
            self._postprocess(result)
        num_tokens = plan.num_tokens - num_decode
        return StepSize(num_tokens - num_tokens * num_done // under_way.num_layers, num_decode + num_read)

    def _give_up(self, plan: Plan, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._shed(plan)
        else:
            self._fail([chunk.seq for chunk in plan.chunks], error)

    def _shed(self, plan: Plan) -> None:
        """Out of device memory: give up the largest piece of work; the others run again in the next step."""
        running = [chunk for chunk in plan.chunks if chunk.seq.status is Status.RUNNING]
        if not running:
            return
        largest = max(running, key=lambda chunk: chunk.length)
        message = "the device ran out of memory for this request; shorten it or try again later"
        self._on_failure(largest.seq, Failure("out_of_memory", message))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _postprocess(self, result: StepResult) -> None:
        # A sequence may have ended while its layers ran, because its client left.
        for chunk in result.plan.chunks:
            if chunk.seq.status is not Status.RUNNING:
                continue
            chunk.seq.num_computed = chunk.start + chunk.length
            self._blocks.commit(chunk.seq)
            # After a preemption the prompt is computed again, but its scores are known already.
            if chunk.start == len(chunk.seq.prompt_logprobs):
                chunk.seq.prompt_logprobs += result.prompt_logprobs.get(id(chunk.seq), ())
        for seq, sampled in result.sampled:
            if seq.status is Status.RUNNING:
                self._on_token(seq, sampled)

    def _fail(self, seqs: list[Sequence], error: Exception) -> None:
        for seq in (seq for seq in seqs if seq.status is Status.RUNNING):
            self._on_failure(seq, Failure("engine_error", f"the step failed: {type(error).__name__}: {error}"))

    # --- decode rows ------------------------------------------------------------------------------------------------

    def _step_ahead(self) -> StepSize | None:
        """Launch the next decode step before the tokens of the one in flight are read. None where a schedule is due."""
        path, scheduler = self._path, self._scheduler
        if path is None or self._in_flight is None or scheduler.could_admit() or path.is_sparse():
            return None
        if scheduler.num_waiting and self._steps_ahead >= _MOST_STEPS_AHEAD:
            return None
        before = self._launch_ahead()
        return StepSize(0, self._read_rows(before)) if before else None

    def _launch_ahead(self) -> LaunchedRows | None:
        """Launch the rows' next step; the one before, whose tokens are to be read. None where there can be no next."""
        path, before = self._path, self._in_flight
        if path is None or before is None:
            return None
        live = path.live()
        for row, seq in live:
            if not self._blocks.grow(seq, path.next_position(row) + 1):
                return None
        if not live:
            return None
        self._in_flight = None
        self._launch_rows(path, live, fresh=False)
        self._steps_ahead += 1
        return before

    def _start_rows(self, path: DecodePath, seqs: list[Sequence]) -> None:
        if not path.holds(seqs):
            path.seat(seqs)
        self._steps_ahead = 0
        self._launch_rows(path, path.live(), fresh=True)

    def _launch_rows(self, path: DecodePath, live: list[tuple[int, Sequence]], *, fresh: bool) -> None:
        seqs = [seq for _, seq in live]
        try:
            self._in_flight = path.launch(live, fresh=fresh)
        except Exception as error:  # as in _run
            self._fail(seqs, error)
            return
        if not fresh:  # a schedule has charged for them already
            self._scheduler.charge(seqs)
        for seq in seqs:
            seq.num_computed += 1

    def _read_in_flight(self) -> int:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None or self._path is None:
            return 0
        return self._read_rows(in_flight)

    def _read_rows(self, launched: LaunchedRows) -> int:
        try:
            found = launched.wait()
        except Exception as error:  # a failed kernel shows here
            self._fail([seq for _, seq in launched.seqs if seq.status is Status.RUNNING], error)
            return 0
        for seq, sampled in found:
            # It may have ended since: by an end-of-text token in the step before, or because its client left.
            if seq.status is Status.RUNNING:
                self._blocks.commit(seq)
                self._on_token(seq, sampled)
        return len(found)
