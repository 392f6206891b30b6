"""An engine on a base of random weights with random adapters, as the server runs it but for HTTP, ready to be timed."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import torch

from loraplex_adapters.format import AdapterWeights
from loraplex_server.bench.checkpoint import random_adapter, write_checkpoint, write_config
from loraplex_server.bench.shapes import SHAPES
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.messages import Submit, Warm
from loraplex_server.engine.sequence import Request
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import LoadFormat, load

_BLOCK_SIZE = 16
_SPARE_BYTES = 64 << 20

Quantization = Literal["nf4", "none"]


class CaseFailed(Exception):
    """A request of a measurement failed; the message is the engine's."""


@dataclass(frozen=True)
class BaseChoice:
    """Which base, and how it is held. ``shape``: a name in ``SHAPES``, or the folder of a model, which is loaded as it is.

    ``dtype`` None: what suits the device. ``checkpoint``: random weights are written to disk and loaded, instead of made
    where they are needed.
    """

    shape: str
    device: torch.device
    quantization: Quantization = "nf4"
    dtype: torch.dtype | None = None
    checkpoint: bool = False

    @property
    def is_real(self) -> bool:
        return self.shape not in SHAPES

    @property
    def name(self) -> str:
        """What rows and files call it."""
        return Path(self.shape).resolve().name if self.is_real else self.shape

    @property
    def source(self) -> str:
        """Where its weights come from: a model, random ones in a checkpoint, or random ones made in place."""
        return "model" if self.is_real else "checkpoint" if self.checkpoint else "dummy"

    @property
    def load_format(self) -> LoadFormat:
        return "dummy" if self.source == "dummy" else "auto"

    def folder(self, scratch: Path) -> Path:
        """The model's folder; a random one is made below ``scratch``."""
        if self.is_real:
            return Path(self.shape)
        make = write_checkpoint if self.checkpoint else write_config
        return make(scratch / self.shape, self.shape)


@dataclass(frozen=True)
class LoadedBase:
    """A base, and what loading it took: seconds, and bytes held by the device at most and in the end."""

    decoder: Decoder
    choice: BaseChoice
    load_s: float
    peak_bytes: int
    held_bytes: int

    def columns(self) -> dict[str, object]:
        return {
            "shape": self.choice.name,
            "quantization": self.choice.quantization,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "source": self.choice.source,
            "load_s": round(self.load_s, 2),
            "weights_gb": round(self.decoder.weight_bytes / 1e9, 3),
            "load_peak_gb": round(self.peak_bytes / 1e9, 3),
        }


def load_base(choice: BaseChoice, scratch: Path) -> LoadedBase:
    """Load the base; files go below ``scratch``."""
    folder = choice.folder(scratch)
    on_gpu = choice.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    decoder = load(
        folder,
        device=choice.device,
        dtype=choice.dtype,
        quantization=choice.quantization,
        load_format=choice.load_format,
    )
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    held = torch.cuda.memory_allocated() if on_gpu else decoder.weight_bytes
    return LoadedBase(decoder, choice, seconds, peak, held)


class Step(NamedTuple):
    """One step of the engine. ``ms``: from the tokens of the step before on the host to this one's.

    ``at_s``: when it ended, on the clock of ``time.perf_counter``. ``started``: requests that got their first token.
    """

    ms: float
    at_s: float
    num_prefill: int
    num_decode: int
    started: tuple[str, ...]


@dataclass(frozen=True)
class RigSize:
    """What the engine must hold at once. ``ranks``: of each adapter; adapter i is called ``a{i}``."""

    max_running: int
    max_tokens: int
    ranks: tuple[int, ...] = ()
    max_batched_tokens: int = 8192


class Rig:
    """An engine whose adapters are all resident. A context manager."""

    def __init__(
        self, base: LoadedBase, size: RigSize, open_adapter: Callable[[str], AdapterWeights] | None = None
    ) -> None:
        """``open_adapter`` takes the place of random adapters."""
        decoder, shape = base.decoder, base.decoder.base_shape
        ranks = {f"a{i}": rank for i, rank in enumerate(size.ranks)}
        # Ranks are held in multiples of eight.
        padded = sum(-(-rank // 8) * 8 for rank in size.ranks)
        per_rank = shape.num_layers * sum(n + k for n, k in shape.linears.values()) * decoder.dtype.itemsize
        adapter_bytes = int(padded * per_rank * 1.25) + _SPARE_BYTES
        limits = EngineLimits(
            max_model_len=size.max_tokens,
            kv_blocks=size.max_running * (size.max_tokens // _BLOCK_SIZE + 2) + 1,
            block_size=_BLOCK_SIZE,
            adapter_bytes=adapter_bytes,
            host_adapter_bytes=adapter_bytes,
            max_running=size.max_running,
            max_batched_tokens=size.max_batched_tokens,
            prefix_cache=False,
        )
        made = open_adapter or (lambda name: random_adapter(shape, rank=ranks[name], seed=int(name[1:])))
        started = time.perf_counter()
        self.engine = Engine(decoder, shape, made, limits, frozenset())
        self.build_s = time.perf_counter() - started
        self.vocab_size = decoder.spec.vocab_size
        self._warm(tuple(ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.close()

    def _warm(self, names: Sequence[str]) -> None:
        for ticket, name in enumerate(names):
            self.engine.handle(Warm(ticket, name))
        while self.engine.is_waiting:
            for done in self.engine.step().done:
                if done.failure is not None:
                    raise CaseFailed(done.failure.message)
            time.sleep(0.001)

    def run(self, requests: Sequence[Request]) -> Iterator[Step]:
        """Serve these requests to their ends, step by step. Raises CaseFailed."""
        for request in requests:
            self.engine.handle(Submit(request))
        waiting, seen = len(requests), set[str]()
        began = time.perf_counter()
        while waiting:
            report = self.engine.step()
            ended = time.perf_counter()
            started = []
            for output in report.outputs:
                if output.failure is not None:
                    raise CaseFailed(output.failure.message)
                if output.request_id not in seen:
                    seen.add(output.request_id)
                    started.append(output.request_id)
                waiting -= output.finish_reason is not None
            yield Step(
                (ended - began) * 1e3, ended, report.num_prefill_tokens, report.num_decode_tokens, tuple(started)
            )
            began = ended
