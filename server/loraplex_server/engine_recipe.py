"""How the served engine comes to be: the base loaded as it was asked for, the machine's memory divided, the engine built.

All of it runs where the engine will, which on a GPU is a process of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from loraplex_adapters.store import AdapterStore
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.host import EngineFacts, Progress
from loraplex_server.logs import configure_logging
from loraplex_server.memory_plan import GIB, TooLittleMemory, inspect, plan_memory
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from loraplex_server.server_config import EngineConfig, LogConfig, ModelConfig

_log = structlog.get_logger("loraplex")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ServedBase:
    """The base in ``folder`` on ``device``; its adapters lie in the store of ``data_dir``. See ``host.EngineRecipe``."""

    folder: Path
    device: torch.device
    model: ModelConfig
    engine: EngineConfig
    data_dir: Path
    log: LogConfig

    def enter_process(self) -> None:
        configure_logging(self.log)

    def load(self, progress: Progress | None) -> "PlannedBase":
        """Raises: ModelError, TooLittleMemory."""
        started = time.perf_counter()
        try:
            decoder = load(
                self.folder,
                device=self.device,
                dtype=_DTYPES.get(self.model.dtype),
                quantization=self.model.quantization,
                load_format=self.model.load_format,
                progress=progress,
            )
        except torch.OutOfMemoryError as error:
            raise _too_large("the base does not fit", error) from error
        _log.info(
            "base loaded",
            model=self.model.model,
            device=str(self.device),
            dtype=str(decoder.dtype).removeprefix("torch."),
            quantization=self.model.quantization,
            gib=round(decoder.weight_bytes / GIB, 2),
            seconds=round(time.perf_counter() - started, 1),
        )
        machine = inspect(self.device, self.engine.gpu_memory_utilization)
        limits = plan_memory(self.engine, decoder.spec, decoder.dtype, self.device, machine, self.model.max_model_len)
        return PlannedBase(decoder, limits, self.data_dir)


@dataclass(frozen=True)
class PlannedBase:
    """A base with its share of the machine. See ``host.LoadedBase``."""

    decoder: Decoder
    limits: EngineLimits
    data_dir: Path

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(self.decoder.base_shape, self.limits.max_model_len)

    def build(self, wake: Callable[[], None]) -> Engine:
        """Raises: TooLittleMemory."""
        decoder, limits = self.decoder, self.limits
        eos_ids = frozenset(decoder.spec.eos_token_ids)
        store = AdapterStore(self.data_dir)
        try:
            engine = Engine(decoder, decoder.base_shape, store.locate, limits, eos_ids, wake=wake)
        except torch.OutOfMemoryError as error:
            raise _too_large("the KV cache and the adapters' memory do not fit beside the base", error) from error
        _log.info(
            "engine",
            max_model_len=limits.max_model_len,
            kv_tokens=(limits.kv_blocks - 1) * limits.block_size,
            adapter_gib=round(limits.adapter_bytes / GIB, 2),
            max_running=limits.max_running,
        )
        return engine


def _too_large(what: str, error: torch.OutOfMemoryError) -> TooLittleMemory:
    first = str(error).partition(". ")[0].partition("\n")[0]
    return TooLittleMemory(
        f"{what} ({first}). Free memory on the GPU, or lower --kv-cache-memory, --adapter-memory or "
        "--gpu-memory-utilization"
    )
