"""What crosses between the event loop and the engine: small frozen values.

Ids, tokens and digests only; adapter weights travel by the store, never through the bridge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loraplex_server.engine.sequence import FinishReason, Request, TokenLogprob

Residency = Literal["gpu", "host", "disk"]


# --- to the engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Warm:
    """Bring an adapter to the GPU ahead of its first request. Answered by ``Done`` with the same ticket."""

    ticket: int
    digest: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep an adapter resident (or let it go again). Takes effect when it is next loaded if it is not resident now."""

    digest: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Give back every tier of an adapter once its last sequence ends. Answered by ``Done``."""

    ticket: int
    digest: str


@dataclass(frozen=True, slots=True)
class ForgetPrefixes:
    """Forget what the KV cache holds of earlier prompts. Answered by ``Done``."""

    ticket: int


# --- from the engine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request or a call failed. ``code`` is stable and maps to an HTTP status in one table."""

    code: Literal["adapter_load_failed", "out_of_memory", "context_too_long", "engine_error", "shutting_down"]
    message: str


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens of one request after a step. The last one carries ``finish_reason`` (and ``failure`` if it failed).

    ``queue_s``: time from submission to the first step it took part in; set on the first output.
    ``cached_tokens``: prompt tokens found in the prefix cache; set on the first output.
    ``stop_token_id``: the end-of-text or stop token that ended the request; it is the last of ``token_ids`` and not part
    of the text.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    stop_token_id: int | None = None
    queue_s: float | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a ``Warm``, ``Release`` or ``ForgetPrefixes``."""

    ticket: int
    failure: Failure | None = None
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """One finished copy of an adapter between tiers, for the metrics."""

    digest: str
    step: Literal["disk_to_host", "host_to_gpu"]
    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Where an adapter is and who uses it."""

    residency: Residency
    num_bytes: int
    num_running: int = 0
    num_waiting: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state after a step. ``adapters`` names every adapter that is in memory or has requests."""

    num_running: int = 0
    num_waiting: int = 0
    num_base_running: int = 0
    num_base_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    adapter_bytes_used: int = 0
    adapter_bytes_total: int = 0
    host_bytes_used: int = 0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    adapters: Mapping[str, AdapterState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepReport:
    """Everything one step has to say, in one message. ``step_s`` 0 means that no forward pass ran.

    ``plain_ids`` and ``plain_tokens``: requests that got one token and nothing else to be said, and those tokens. From a
    process nearly all outputs come in this form, which costs a tenth to pack and to unpack; the engine makes none.
    """

    outputs: tuple[TokenOutput, ...] = ()
    plain_ids: Sequence[str] = ()
    plain_tokens: Sequence[int] = ()
    done: tuple[Done, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    step_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    stats: EngineStats | None = None


Command = Submit | Abort | Warm | Pin | Release | ForgetPrefixes
