"""Settings at the edge: flags and ``LORAPLEX_*`` variables in, frozen values out. Nothing below cli and app imports this.

A flag wins over its environment variable, which wins over the default.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from loraplex_server.server_config import (
    AdapterConfig,
    EngineConfig,
    HttpConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    NamedSource,
    ServerConfig,
)
from loraplex_server.sizes import parse_size

ENV_PREFIX = "LORAPLEX_"

_SECRETS = frozenset({"api_key", "admin_key"})


class ConfigError(Exception):
    """A setting cannot be used; the message names its flag and its environment variable."""


def _items(value: object) -> object:
    """Environment variables hold lists as text with commas."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _size_or_auto(value: object) -> object:
    return None if value == "auto" else _size(value)


def _length_or_auto(value: object) -> object:
    return None if value == "auto" else value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


def _named_source(value: str) -> str:
    name, separator, source = value.partition("=")
    if not (name.strip() and separator and source.strip()):
        raise ValueError(f"{value[:140]!r} is not NAME=SOURCE, as in poet=./adapters/poet or poet=hf://org/poet")
    return value


def _key(value: str) -> str:
    if not value.strip() or not value.isascii():
        raise ValueError("a key must be plain ASCII text and not empty; leave it out to serve without one")
    return value


Texts = Annotated[list[str], NoDecode, BeforeValidator(_items)]
Keys = Annotated[list[Annotated[str, AfterValidator(_key)]], NoDecode, BeforeValidator(_items)]
NamedSources = Annotated[list[Annotated[str, AfterValidator(_named_source)]], NoDecode, BeforeValidator(_items)]
Paths = Annotated[list[Path], NoDecode, BeforeValidator(_items)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=1)]
AutoSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_size_or_auto)]
AutoTokens = Annotated[Annotated[int, Field(ge=16, le=1_000_000)] | None, BeforeValidator(_length_or_auto)]
AutoLength = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_length_or_auto)]


class ServeSettings(BaseSettings):
    """Every setting of ``loraplex serve``; the descriptions are its help."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, protected_namespaces=(), env_ignore_empty=True
    )

    # What is served
    model: str = Field(min_length=1, description="The base model: a local folder or a Hugging Face Hub id.")
    served_model_name: Texts = Field(
        [], description="What requests call the base. The first is its own name, the others work as well. Repeatable."
    )
    adapter: NamedSources = Field(
        [],
        description="An adapter to serve from the start, as NAME=SOURCE; a source is a folder, an archive or "
        "hf://org/repo[@revision]. Repeatable.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the base on the Hub.")
    chat_template: Path | None = Field(None, description="A Jinja file that replaces the tokenizer's chat template.")
    max_model_len: AutoLength = Field(
        None, description="Most tokens of prompt and answer together; auto takes the model's own limit."
    )

    # How it is held
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to run; auto takes a GPU if there is one."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of activations and of weights that are not quantized; auto fits the device."
    )
    quantization: Literal["nf4", "none"] = Field(
        "nf4",
        description="nf4 holds the linears in 4 bits (NF4, double quantization); none keeps the checkpoint's own.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy makes random weights from config.json alone, to try out speed and memory."
    )

    engine_process: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether the engine runs in a process of its own; auto does that on a GPU."
    )

    # HTTP
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface (then set keys).")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: Keys = Field(
        [], description="Key that requests must carry. Without any key, requests are open. Repeatable."
    )
    admin_key: Keys = Field(
        [], description="Key for admin calls (uploads, unloads); it opens requests too. Repeatable, to rotate keys."
    )
    max_body_bytes: Size = Field(8 << 20, description="Largest request body, uploads aside.")
    drain_timeout_s: float = Field(
        60.0, ge=0, le=86400, description="Seconds that running requests get to finish after SIGTERM."
    )

    # Adapters
    data_dir: Path | None = Field(
        None,
        description="Where uploaded adapters and their names live; one directory a base. Default: "
        "$XDG_DATA_HOME/loraplex/MODEL.",
    )
    adapter_root: Paths = Field([], description="Folder below which admin calls may name paths as sources. Repeatable.")
    allow_hub: bool = Field(True, description="Whether admin calls may name hf:// sources.")
    max_adapter_bytes: Size = Field(2 << 30, description="Largest adapter, packed or unpacked.")

    # Memory
    kv_cache_memory: AutoSize = Field(
        None, description="Memory of the KV cache, as 2GiB; auto takes what the other parts leave."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory that the server may use in all."
    )
    adapter_memory: AutoSize = Field(
        None, description="Device memory for adapters, as 1GiB; auto takes a share of what the base leaves."
    )
    host_adapter_memory: AutoSize = Field(
        None, description="Host memory that keeps adapters ready to go back to the device; auto fits the machine."
    )
    block_size: Annotated[int, AfterValidator(_power_of_two)] = Field(
        16, ge=8, le=128, description="Tokens in one block of the KV cache: 8, 16, 32, 64 or 128."
    )

    # Batching
    max_running: int = Field(64, ge=1, le=4096, description="Most sequences in one step.")
    max_waiting: int = Field(512, ge=1, le=1_000_000, description="Most requests in the queue; more are answered 429.")
    max_waiting_tokens: int = Field(
        1_000_000, ge=1, description="Most prompt tokens in the queue; more are answered 429."
    )
    max_batched_tokens: AutoTokens = Field(
        None,
        description="Most tokens in one step; longer prompts are computed in pieces. auto takes up to 8192 on a GPU, as "
        "its memory allows, and 2048 on a CPU.",
    )
    max_mixed_tokens: int = Field(
        512,
        ge=16,
        le=1_000_000,
        description="Prompt tokens whose time may pass between two tokens of running answers: fewer keep these fluent, "
        "more shorten the wait for new ones.",
    )
    prefix_cache: bool = Field(True, description="Whether to reuse the KV cache of equal beginnings of prompts.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of requests that bring none.")

    # Watching
    metrics_access: Literal["open", "user", "off"] = Field(
        "open", description="Who may read /metrics: anyone, holders of a key, or nobody."
    )
    metrics_adapters: int = Field(
        50, ge=0, le=10_000, description="Adapters with metrics of their own; the rest is counted as `other`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="Form of the log; auto is console at a terminal and json elsewhere."
    )

    @model_validator(mode="after")
    def _one_step_fits(self) -> "ServeSettings":
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_running:
            raise ValueError(
                f"--max-batched-tokens ({self.max_batched_tokens}) must be at least --max-running ({self.max_running}): "
                "each running sequence takes a token of every step"
            )
        names = [source.partition("=")[0].strip() for source in self.adapter]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"--adapter names {twice!r} twice; give each adapter a name of its own")
        return self

    def to_config(self) -> ServerConfig:
        """The settings by who needs them."""
        return ServerConfig(
            model=ModelConfig(
                model=self.model,
                names=tuple(self.served_model_name) or (_default_name(self.model),),
                revision=self.revision,
                chat_template=self.chat_template,
                max_model_len=self.max_model_len,
                device=self.device,
                dtype=self.dtype,
                quantization=self.quantization,
                load_format=self.load_format,
            ),
            engine=EngineConfig(
                kv_cache_bytes=self.kv_cache_memory,
                gpu_memory_utilization=self.gpu_memory_utilization,
                adapter_bytes=self.adapter_memory,
                host_adapter_bytes=self.host_adapter_memory,
                block_size=self.block_size,
                max_running=self.max_running,
                max_waiting=self.max_waiting,
                max_waiting_tokens=self.max_waiting_tokens,
                max_batched_tokens=self.max_batched_tokens,
                max_mixed_tokens=self.max_mixed_tokens,
                prefix_cache=self.prefix_cache,
                seed=self.seed,
                process=self.engine_process,
            ),
            adapters=AdapterConfig(
                preloaded=tuple(_split(source) for source in self.adapter),
                data_dir=self.data_dir or default_data_dir(self.model),
                roots=tuple(self.adapter_root),
                allow_hub=self.allow_hub,
                max_bytes=self.max_adapter_bytes,
            ),
            http=HttpConfig(
                host=self.host,
                port=self.port,
                api_keys=tuple(self.api_key),
                admin_keys=tuple(self.admin_key),
                max_body_bytes=self.max_body_bytes,
                drain_timeout_s=self.drain_timeout_s,
            ),
            metrics=MetricsConfig(access=self.metrics_access, max_adapters=self.metrics_adapters),
            log=LogConfig(level=self.log_level, format=self.log_format),
        )


SETTINGS_HELP: Mapping[str, str] = {name: field.description or "" for name, field in ServeSettings.model_fields.items()}
"""Each setting's help text."""


def load_config(given: Mapping[str, Any]) -> ServerConfig:
    """The configuration from flags (``given``, by setting; None or () if a flag was not used) and the environment.

    Raises: ConfigError, naming every setting that cannot be used.
    """
    used = {name: value for name, value in given.items() if value is not None and value not in ((), [])}
    try:
        return ServeSettings(**used).to_config()
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(detail) for detail in error.errors()))) from None


def flag_of(setting: str) -> str:
    """``--max-running`` for ``max_running``."""
    return f"--{setting.replace('_', '-')}"


def env_of(setting: str) -> str:
    """``LORAPLEX_MAX_RUNNING`` for ``max_running``."""
    return f"{ENV_PREFIX}{setting.upper()}"


def default_data_dir(model: str) -> Path:
    """Below the user's data home, one directory a base, so that adapters of two bases never meet."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    local = Path(model).expanduser()
    name = str(local.resolve()) if local.exists() else model
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.")
    return Path(home).expanduser() / "loraplex" / (slug[-128:] or "model")


def _default_name(model: str) -> str:
    local = Path(model).expanduser()
    return local.resolve().name if local.is_dir() else model


def _split(source: str) -> NamedSource:
    name, _, where = source.partition("=")
    return NamedSource(name.strip(), where.strip())


def _explain(detail: ErrorDetails) -> str:
    reason = detail["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not detail["loc"]:
        return reason
    setting = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"there is no setting {setting}"
    where = f"{flag_of(setting)} (or {env_of(setting)})"
    if detail["type"] == "missing":
        return f"{where} is required: {SETTINGS_HELP[setting]}"
    got = "" if setting in _SECRETS or detail["type"] == "value_error" else f", not {str(detail['input'])[:80]!r}"
    return f"{where}: {reason}{got}"
