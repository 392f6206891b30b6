"""What crosses between the server's process and the engine's, as bytes: frames of a length and a pickled value.

Pickle, because both ends are this program, over a socket pair that nobody else holds; nothing that a user sent is ever
unpickled. A step's tokens go as two plain lists: 2 us to pack and 3 to unpack for 32 requests, where the dataclasses they
stand for take 96 and 121.
"""

import pickle
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from struct import Struct
from typing import Any

from loraplex_server.engine.host import EngineDeath, EngineFacts
from loraplex_server.engine.messages import AdapterState, EngineStats, StepReport, TokenOutput

_LENGTH = Struct("<I")
_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Loading:
    """Bytes of the base read so far."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The base is in memory; the engine is being built."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class Started:
    """The engine takes commands."""


@dataclass(frozen=True, slots=True)
class NotStarted:
    """Loading or building failed. ``error``: what was raised, where it can be sent."""

    death: EngineDeath
    error: BaseException | None = None

    @classmethod
    def of(cls, error: BaseException) -> "NotStarted":
        death = EngineDeath.of(error)
        # A traceback does not cross; words do.
        error.add_note("In the engine's process:\n" + "".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error, _PROTOCOL))  # noqa: S301 - our own bytes
        except Exception:  # exceptions may hold anything and be made in any way
            return cls(death)
        return cls(death, error)


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has ended; ``death`` says of what, None if it was asked to."""

    death: EngineDeath | None


def pack(value: object) -> bytes:
    """One frame."""
    packed = pickle.dumps(value, _PROTOCOL)
    return _LENGTH.pack(len(packed)) + packed


class Frames:
    """Cuts a stream of bytes into the values of its frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values that these bytes complete."""
        data = self._rest + data if self._rest else data
        begin, end = 0, len(data)
        try:
            while end - begin >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data, begin)
                if end - begin - _LENGTH.size < length:
                    break
                begin += _LENGTH.size
                packed = data[begin : begin + length]
                begin += length
                yield pickle.loads(packed)  # noqa: S301 - from our own other half
        finally:  # whoever stops reading half-way goes on with the rest
            self._rest = data[begin:]


class ReportPacker:
    """Packs reports on the engine's side. Of the adapters' states only those that have changed are sent."""

    def __init__(self) -> None:
        self._adapters: Mapping[str, AdapterState] = {}

    def pack(self, report: StepReport) -> bytes:
        """One frame."""
        ids: list[str] = []
        tokens: list[int] = []
        others: list[TokenOutput] = []
        for output in report.outputs:
            if _is_plain(output):
                ids.append(output.request_id)
                tokens.append(output.token_ids[0])
            else:
                others.append(output)
        sizes = (report.step_s, report.num_prefill_tokens, report.num_decode_tokens)
        return pack((ids, tokens, others, report.done, report.loads, sizes, self._stats(report.stats)))

    def _stats(self, stats: EngineStats | None) -> tuple[EngineStats, dict[str, AdapterState], list[str]] | None:
        if stats is None:
            return None
        before, now = self._adapters, stats.adapters
        # The engine gives the same object again for what has not changed, so thousands are told apart in no time.
        changed = {digest: state for digest, state in now.items() if before.get(digest) is not state}
        gone = [] if before.keys() <= now.keys() else [digest for digest in before if digest not in now]
        self._adapters = now
        return replace(stats, adapters={}), changed, gone


class ReportUnpacker:
    """Makes reports again of what a ``ReportPacker`` has packed."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterState] = {}

    def unpack(self, packed: tuple[Any, ...]) -> StepReport:
        """The report of one frame's value."""
        ids, tokens, others, done, loads, (step_s, num_prefill, num_decode), stats = packed
        if stats is not None:
            stats, changed, gone = stats
            if changed or gone:
                kept = {digest: state for digest, state in self._adapters.items() if digest not in gone}
                self._adapters = {**kept, **changed}
            stats = replace(stats, adapters=self._adapters)
        return StepReport(
            outputs=others,
            plain_ids=ids,
            plain_tokens=tokens,
            done=done,
            loads=loads,
            step_s=step_s,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            stats=stats,
        )


def _is_plain(output: TokenOutput) -> bool:
    return (
        output.finish_reason is None
        and output.queue_s is None
        and len(output.token_ids) == 1
        and not output.logprobs
        and not output.prompt_logprobs
        and output.cached_tokens is None
        and output.stop_token_id is None
        and output.failure is None
    )
