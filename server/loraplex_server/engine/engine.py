"""The engine: ``step()`` is schedule, run, postprocess. One thread owns it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_states import AdapterStates
from loraplex_server.engine.blocks import BlockPool
from loraplex_server.engine.image_source import OpenAdapter
from loraplex_server.engine.messages import (
    Abort,
    Command,
    Done,
    EngineStats,
    Failure,
    ForgetPrefixes,
    Pin,
    Release,
    StepReport,
    Submit,
    TokenOutput,
    Warm,
)
from loraplex_server.engine.residency import AdapterResidency, Limits
from loraplex_server.engine.runner import Runner
from loraplex_server.engine.sampler import Sampled, Sampler
from loraplex_server.engine.scheduler import DEFAULT_MIXED_TOKENS, Scheduler, SchedulerLimits
from loraplex_server.engine.sequence import FinishReason, Request, Sequence
from loraplex_server.engine.stepper import Stepper
from loraplex_server.model.adapter_rows import fuses
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache

if TYPE_CHECKING:
    from loraplex_server.engine.decode_path import DecodePath
    from loraplex_server.engine.prompt_path import PromptPath

# How often the state of every adapter is reported while nothing forces it, in seconds.
_ADAPTER_STATES_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine may use.

    kv_blocks blocks of block_size tokens; adapter bytes on the device and in host memory; max_running sequences at
    once; max_batched_tokens a step; max_model_len tokens a sequence, prompt and answer together. Between two tokens of
    sequences that decode, prompts get the time of max_mixed_tokens.
    """

    max_model_len: int
    kv_blocks: int
    block_size: int
    adapter_bytes: int
    host_adapter_bytes: int
    max_running: int
    max_batched_tokens: int
    max_mixed_tokens: int = DEFAULT_MIXED_TOKENS
    prefix_cache: bool = True
    fair_wait_s: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class _Tickets:
    """Calls that are answered when their adapter gets somewhere."""

    warming: dict[int, str] = field(default_factory=dict)
    releasing: dict[int, str] = field(default_factory=dict)


class Engine:
    """Serves requests on one decoder with any mix of adapters."""

    def __init__(
        self,
        decoder: Decoder,
        base: BaseShape,
        open_adapter: OpenAdapter,
        limits: EngineLimits,
        eos_ids: frozenset[int],
        *,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._eos_ids = eos_ids
        self._kv = KVCache.allocate(
            num_layers=decoder.spec.num_layers,
            num_blocks=limits.kv_blocks,
            block_size=limits.block_size,
            num_kv_heads=decoder.spec.num_kv_heads,
            head_dim=decoder.spec.head_dim,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self._blocks = BlockPool(limits.kv_blocks, limits.block_size, prefix_cache=limits.prefix_cache)
        self._residency = AdapterResidency(
            open_adapter=open_adapter,
            base=base,
            limits=Limits(limits.adapter_bytes, limits.host_adapter_bytes),
            dtype=decoder.dtype,
            device=decoder.device,
            wake=wake,
            weights=decoder,
        )
        self._scheduler = Scheduler(
            self._blocks,
            self._residency,
            SchedulerLimits(limits.max_running, limits.max_batched_tokens, limits.max_mixed_tokens, limits.fair_wait_s),
        )
        path, fused = build_decode_path(decoder, self._kv, self._residency, limits, eos_ids)
        self._stepper = Stepper(
            Runner(decoder, self._kv, self._residency, Sampler(eos_ids), fused),
            path,
            self._scheduler,
            self._blocks,
            mixed_tokens=limits.max_mixed_tokens,
            on_token=self._append,
            on_failure=self._fail,
        )
        self._seqs: dict[str, Sequence] = {}
        self._tickets = _Tickets()
        self._outputs: list[TokenOutput] = []
        self._done: list[Done] = []
        self._adapter_states = AdapterStates()
        self._states_at = float("-inf")
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        """False when ``step`` would have nothing to do until the next command (or a finished copy)."""
        return bool(self._stepper.has_work or self._outputs or self._done)

    @property
    def is_waiting(self) -> bool:
        """True while requests or calls wait for something that a later step may bring."""
        tickets = self._tickets
        return self._scheduler.has_work or bool(tickets.warming or tickets.releasing)

    def handle(self, command: Command) -> None:
        """Take one command; its effect shows in the reports of later steps."""
        match command:
            case Submit(request):
                self._submit(request)
            case Abort(request_id):
                seq = self._seqs.get(request_id)
                if seq is not None:
                    self._finish(seq, "abort")
            case Warm(ticket, digest):
                self._tickets.warming[ticket] = digest
                self._residency.prefetch(digest)
            case Pin(digest, pinned):
                self._residency.pin(digest, pinned)
            case Release(ticket, digest):
                self._tickets.releasing[ticket] = digest
            case ForgetPrefixes(ticket):
                self._blocks.forget()
                self._done.append(Done(ticket))

    def step(self) -> StepReport:
        """Run one step and say what it brought. Raises nothing: failures are outputs."""
        loads = self._residency.poll()
        self._answer_tickets()
        started = time.perf_counter()
        num_prefill, num_decode = self._stepper.step(self._clock())
        if not self._scheduler.num_waiting:
            self._residency.expose()
        step_s = time.perf_counter() - started if num_prefill or num_decode else 0.0
        outputs, self._outputs = tuple(self._outputs), []
        done, self._done = tuple(self._done), []
        return StepReport(
            outputs=outputs,
            done=done,
            loads=tuple(loads),
            step_s=step_s,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            stats=self._stats(force=bool(loads or done) or not self._scheduler.has_work),
        )

    def close(self) -> None:
        """Fail what is left and stop the copying threads."""
        for seq in list(self._seqs.values()):
            self._finish(seq, "error", Failure("shutting_down", "the server is shutting down"))
        self._stepper.close()
        self._residency.close()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        room = self.limits.max_model_len - len(request.prompt_ids)
        capacity = self._blocks.num_blocks * self.limits.block_size
        if room < 1 or len(request.prompt_ids) >= capacity:
            limit = min(self.limits.max_model_len, capacity)
            message = f"the prompt has {len(request.prompt_ids)} tokens; prompt and answer have room for {limit}"
            failure = Failure("context_too_long", message)
            self._outputs.append(TokenOutput(request.id, (), finish_reason="error", failure=failure))
            return
        self._num_submitted += 1
        seed = request.sampling.seed
        if seed is None:
            seed = (self.limits.seed + self._num_submitted) * 0x9E3779B97F4A7C15 % 2**63
        seq = Sequence(request, seed, self._clock())
        self._seqs[request.id] = seq
        self._scheduler.add(seq)

    def _finish(self, seq: Sequence, reason: FinishReason, failure: Failure | None = None) -> None:
        """End a sequence with an output of its own, outside the normal flow of tokens."""
        self._retire(seq)
        self._outputs.append(TokenOutput(seq.request.id, (), finish_reason=reason, failure=failure))

    def _fail(self, seq: Sequence, failure: Failure) -> None:
        self._finish(seq, "error", failure)

    def _retire(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._stepper.retire(seq)
        del self._seqs[seq.request.id]

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _append(self, seq: Sequence, sampled: Sampled) -> None:
        if not sampled.finite:
            self._finish(seq, "error", Failure("engine_error", "the model produced values that are not numbers"))
            return
        first = seq.num_output == 0
        seq.tokens.append(sampled.token_id)
        reason, stop_token = self._why_finished(seq, sampled.token_id)
        if reason is not None:
            self._retire(seq)
        self._outputs.append(
            TokenOutput(
                seq.request.id,
                (sampled.token_id,),
                logprobs=(sampled.logprob,) if sampled.logprob else (),
                prompt_logprobs=tuple(seq.prompt_logprobs) if first else (),
                finish_reason=reason,
                stop_token_id=stop_token,
                queue_s=(seq.started_s or seq.arrival_s) - seq.arrival_s if first else None,
                cached_tokens=seq.num_cached if first else None,
            )
        )

    def _why_finished(self, seq: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = seq.request.sampling
        ends = token_id in params.stop_token_ids or (token_id in self._eos_ids and not params.ignore_eos)
        if ends and seq.num_output >= params.min_tokens:
            return "stop", token_id
        if seq.num_output >= params.max_tokens or len(seq.tokens) >= self.limits.max_model_len:
            return "length", None
        if len(seq.tokens) >= self._blocks.num_blocks * self.limits.block_size:
            return "length", None
        return None, None

    # --- calls and state --------------------------------------------------------------------------------------------

    def _answer_tickets(self) -> None:
        warming = self._tickets.warming
        for ticket, digest in list(warming.items()):
            if self._residency.is_resident(digest):
                self._done.append(Done(ticket))
                del warming[ticket]
            elif (failure := self._residency.take_failure(digest)) is not None:
                self._done.append(Done(ticket, failure))
                del warming[ticket]
        releasing = self._tickets.releasing
        for ticket, digest in list(releasing.items()):
            if self._scheduler.has_requests_for(digest):
                continue
            freed = self._residency.drop(digest)
            if freed is not None:
                self._done.append(Done(ticket, freed_bytes=freed))
                del releasing[ticket]
                self._give_up_warming(digest)

    def _give_up_warming(self, digest: str) -> None:
        """Nobody will bring in an adapter that has just been released."""
        for ticket, wanted in list(self._tickets.warming.items()):
            if wanted == digest:
                self._done.append(Done(ticket, Failure("adapter_load_failed", "the adapter was released meanwhile")))
                del self._tickets.warming[ticket]

    def _stats(self, *, force: bool) -> EngineStats | None:
        now = self._clock()
        if not force and now - self._states_at < _ADAPTER_STATES_EVERY_S:
            return None
        self._states_at = now
        scheduler, residency = self._scheduler, self._residency
        counts = {key: (running, waiting) for key, running, waiting in scheduler.counts()}
        base_running, base_waiting = counts.pop("", (0, 0))
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_base_running=base_running,
            num_base_waiting=base_waiting,
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_total=self._blocks.num_blocks,
            adapter_bytes_used=residency.bytes_used,
            adapter_bytes_total=residency.bytes_total,
            host_bytes_used=residency.host_bytes_used,
            num_preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            adapters=self._adapter_states.now(residency, counts),
        )


def build_decode_path(
    decoder: Decoder, kv: KVCache, residency: AdapterResidency, limits: EngineLimits, eos_ids: frozenset[int]
) -> tuple[DecodePath | None, PromptPath | None]:
    """The rows that decode and the path of prompts, where the device and its kernels allow them."""
    if decoder.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None, None
    from loraplex_server.engine.decode_path import DecodePath
    from loraplex_server.engine.device_adapters import DeviceAdapters
    from loraplex_server.engine.prompt_path import PromptPath
    from loraplex_server.model.fused import FusedForward

    adapters = DeviceAdapters(decoder.base_shape, residency.arena, max_rows=limits.max_running, fuses=fuses(decoder))
    residency.tables = adapters
    forward = FusedForward(decoder, kv, max_sequences=limits.max_running)
    path = DecodePath(
        forward,
        max_rows=limits.max_running,
        max_model_len=limits.max_model_len,
        block_size=limits.block_size,
        vocab_size=decoder.spec.vocab_size,
        eos_ids=eos_ids,
        dtype=decoder.dtype,
        device=decoder.device,
        adapters=adapters,
    )
    path.capture_all()
    return path, PromptPath(decoder, kv, adapters, residency, max_tokens=limits.max_batched_tokens)
