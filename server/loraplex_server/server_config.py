"""What a server is told, by who needs it. Frozen; made by ``config.load_config``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple


class NamedSource(NamedTuple):
    """An adapter to serve from the start. ``source``: a folder, an archive or ``hf://org/repo[@revision]``."""

    name: str
    source: str


@dataclass(frozen=True)
class ModelConfig:
    """The base. ``names``: what requests call it, its own first. ``max_model_len`` None: the model's own limit."""

    model: str
    names: tuple[str, ...]
    revision: str | None
    chat_template: Path | None
    max_model_len: int | None
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    quantization: Literal["nf4", "none"]
    load_format: Literal["auto", "dummy"]


@dataclass(frozen=True)
class EngineConfig:
    """Memory and batching. Sizes in bytes; None is found out at start. ``process``: whether it runs in its own."""

    kv_cache_bytes: int | None
    gpu_memory_utilization: float
    adapter_bytes: int | None
    host_adapter_bytes: int | None
    block_size: int
    max_running: int
    max_waiting: int
    max_waiting_tokens: int
    max_batched_tokens: int | None
    max_mixed_tokens: int
    prefix_cache: bool
    seed: int
    process: Literal["auto", "on", "off"]


@dataclass(frozen=True)
class AdapterConfig:
    """Where adapters live and come from. ``roots``: folders below which admin calls may name paths."""

    preloaded: tuple[NamedSource, ...]
    data_dir: Path
    roots: tuple[Path, ...]
    allow_hub: bool
    max_bytes: int


@dataclass(frozen=True)
class HttpConfig:
    """Where to listen, and for whom."""

    host: str
    port: int
    api_keys: tuple[str, ...] = field(repr=False)
    admin_keys: tuple[str, ...] = field(repr=False)
    max_body_bytes: int
    drain_timeout_s: float


@dataclass(frozen=True)
class MetricsConfig:
    """``max_adapters``: adapters with series of their own."""

    access: Literal["open", "user", "off"]
    max_adapters: int


@dataclass(frozen=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"]
    format: Literal["auto", "console", "json"]


@dataclass(frozen=True)
class ServerConfig:
    """Everything that ``loraplex serve`` was told."""

    model: ModelConfig
    engine: EngineConfig
    adapters: AdapterConfig
    http: HttpConfig
    metrics: MetricsConfig
    log: LogConfig
