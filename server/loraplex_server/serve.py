"""Puts a server together: base, adapters, engine, HTTP; runs it, and drains it when asked to stop."""

import asyncio
import fcntl
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import structlog
import torch
import uvicorn
from fastapi import FastAPI

from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore
from loraplex_server.app import create_app
from loraplex_server.auth import Access, Keys, is_loopback
from loraplex_server.collector import spare_what_is_there
from loraplex_server.engine.host import EngineNotStarted, Progress
from loraplex_server.engine.messages import Command, Pin, Warm
from loraplex_server.engine.process import EngineProcess
from loraplex_server.engine.thread import EngineThread
from loraplex_server.engine.worker import Worker
from loraplex_server.engine_recipe import ServedBase
from loraplex_server.listening import CannotListen, take_addresses
from loraplex_server.memory_plan import TooLittleMemory
from loraplex_server.metrics import Metrics, adapter_names
from loraplex_server.model.source import resolve
from loraplex_server.server_config import AdapterConfig, ModelConfig, ServerConfig
from loraplex_server.services import BaseModel, HttpLimits, Services
from loraplex_server.tokenizer import Tokenizer
from loraplex_server.web import web_config

_log = structlog.get_logger("loraplex")
_METRICS_ACCESS = {"open": Access.OPEN, "user": Access.USER, "off": None}


class StartError(Exception):
    """The server cannot start as it was told to; the message says why and what to change."""


class EngineDied(Exception):
    """The engine failed as a whole. Whoever watches over the process should start it again."""


def serve(config: ServerConfig, progress: Progress | None = None) -> None:
    """Load, listen, and return after SIGTERM or SIGINT, once running requests have ended.

    Raises: StartError, ModelError, AdapterError, TooLittleMemory, EngineNotStarted, EngineDied.
    """
    try:
        sockets = take_addresses(config.http.host, config.http.port)
    except CannotListen as error:
        raise StartError(str(error)) from error
    with ExitStack() as stack:
        for bound in sockets:
            stack.enter_context(bound)
        services = build_services(config, stack, progress)
        server = DrainingServer(create_app(services), services.worker, config)
        try:
            server.run(sockets)
        except SystemExit:  # uvicorn's way out when the app cannot start; the log has the traceback
            raise _why_not_started(services.worker) from None
    _log.info("stopped")
    if services.worker.death is not None:
        raise EngineDied("the engine failed and cannot go on; the log says where. Start the server again")


def build_services(config: ServerConfig, stack: ExitStack, progress: Progress | None = None) -> Services:
    """Everything behind the HTTP routes; the engine itself starts with the app, and ends with ``stack`` at the latest."""
    _lock(config.adapters.data_dir)
    folder = resolve(config.model.model, revision=config.model.revision, token=os.environ.get("HF_TOKEN"))
    host = _pick_host(config, folder)
    stack.callback(host.close)
    tokenizer = _load_tokenizer(folder, config.model)
    facts = host.load(progress)
    installer = _open_adapters(config.adapters, facts.base, config.model.names)
    registry = installer.registry
    metrics = Metrics(
        model_name=config.model.names[0],
        names=lambda: adapter_names(registry),
        max_adapters=config.metrics.max_adapters,
    )
    worker = Worker(
        host,
        max_model_len=facts.max_model_len,
        max_waiting=config.engine.max_waiting,
        max_waiting_tokens=config.engine.max_waiting_tokens,
        on_report=metrics.on_report,
        first=_preload(installer, config.adapters),
    )
    return Services(
        worker=worker,
        registry=registry,
        installer=installer,
        tokenizer=tokenizer,
        base=BaseModel(
            names=config.model.names,
            root=config.model.model,
            fingerprint=facts.base.fingerprint,
            vocab_size=facts.base.vocab_size,
            created_at=int(time.time()),
        ),
        keys=Keys(config.http.api_keys, config.http.admin_keys, loopback=is_loopback(config.http.host)),
        metrics=metrics,
        metrics_access=_METRICS_ACCESS[config.metrics.access],
        limits=HttpLimits(max_body_bytes=config.http.max_body_bytes, drain_timeout_s=config.http.drain_timeout_s),
    )


class DrainingServer(uvicorn.Server):
    """uvicorn, except that the first signal drains: the port stays open and /ready says 503 until the running requests
    have ended. A second signal stops at once."""

    def __init__(self, app: FastAPI, worker: Worker, config: ServerConfig) -> None:
        super().__init__(web_config(app, config.http.host, config.http.port))
        self._worker = worker
        self._drain_timeout_s = config.http.drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        spare_what_is_there()
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                _log.info("ready", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Also end when the engine has died: a server that can only say no is better started again."""
        if self._worker.death is not None and not self.should_exit:
            death = self._worker.death
            # Its message stays out: it may quote a prompt.
            _log.critical("the engine died", exception=death.kind, at=death.at)
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        if self._draining is None:
            _log.info("draining", seconds=self._drain_timeout_s)
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        ended = await self._worker.drain(self._drain_timeout_s)
        if not ended:
            _log.warning("requests still run at the end of the drain timeout; they are cut off")
            await self._worker.stop()
        self.should_exit = True


def _why_not_started(worker: Worker) -> Exception:
    error = worker.start_error
    if isinstance(error, TooLittleMemory | EngineNotStarted):
        return error
    return StartError(f"the engine could not be built: {type(error).__name__}: {error}")


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    try:
        return Tokenizer.load(folder, config.chat_template)
    except (OSError, ValueError) as error:
        raise StartError(f"the tokenizer of {config.model} cannot be used: {error}") from error


def _pick_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise StartError("--device cuda: torch finds no CUDA device here; use --device cpu, or a torch built for CUDA")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _pick_host(config: ServerConfig, folder: Path) -> EngineThread | EngineProcess:
    """Where the engine runs. A process is started at once, so that it loads while the rest is put together."""
    device = _pick_device(config.model.device)
    recipe = ServedBase(folder, device, config.model, config.engine, config.adapters.data_dir, config.log)
    wanted = config.engine.process
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return EngineThread(recipe)
    host = EngineProcess(recipe)
    host.launch()
    return host


def _open_adapters(config: AdapterConfig, base: BaseShape, base_names: tuple[str, ...]) -> AdapterInstaller:
    """The store and the registry of the data directory. Raises StartError if they belong to another base."""
    registry = AdapterRegistry(config.data_dir / "registry.sqlite", reserved=base_names)
    store = AdapterStore(config.data_dir)
    used = registry.digests_in_use()
    store.sweep(used)
    for adapter in registry.list():
        made_for = store.manifest(adapter.digest).base_fingerprint
        if made_for != base.fingerprint:
            raise StartError(
                f"the data directory {config.data_dir} holds adapters of another base ({adapter.name!r} was stored for "
                f"{made_for[:12]}, this base is {base.fingerprint[:12]}); give this base a --data-dir of its own"
            )
        if adapter.name in base_names:
            raise StartError(
                f"{adapter.name!r} is both the base's name and a stored adapter's; choose another --served-model-name"
            )
    sources = AdapterSources(
        config.roots, os.environ.get("HF_TOKEN"), max_bytes=config.max_bytes, allow_hub=config.allow_hub
    )
    return AdapterInstaller(store, registry, sources, base)


def _lock(data_dir: Path) -> None:
    """Keep the data directory to this process until it ends, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartError(
            f"another server uses the data directory {data_dir}; give this one a --data-dir of its own"
        ) from None


def _preload(installer: AdapterInstaller, config: AdapterConfig) -> list[Command]:
    """Install what the command line names; what to tell the engine of these adapters and of those that are pinned."""
    digests: dict[str, bool] = {}
    for name, source in config.preloaded:
        try:
            if source.startswith("hf://"):
                adapter, _, new = installer.install_source(name, source, replace=True)
            else:
                adapter, _, new = installer.install_path(name, Path(source).expanduser(), replace=True)
        except AdapterError as error:
            raise StartError(f"--adapter {name}={source}: {error}") from error
        _log.info("adapter", name=name, version=adapter.version, new=new, digest=adapter.digest[:12])
        digests[adapter.digest] = adapter.pinned
    for adapter in installer.registry.list():
        if adapter.pinned:
            digests[adapter.digest] = True
    installer.discard_unused()
    commands: list[Command] = [Pin(digest, True) for digest, pinned in digests.items() if pinned]
    # Nobody waits for these; tickets of callers count from zero up.
    return commands + [Warm(-ticket, digest) for ticket, digest in enumerate(digests, start=1)]
