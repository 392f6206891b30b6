"""A whole server over a small random Llama: real engine, store, registry and metrics."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterWeights, LoraFactors
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore
from loraplex_server.auth import Keys
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.thread import EngineThread
from loraplex_server.engine.worker import Worker
from loraplex_server.metrics import Metrics, adapter_names
from loraplex_server.model.decoder import Decoder
from loraplex_server.services import BaseModel, Services
from loraplex_server.tokenizer import Tokenizer
from tests.api.servers import Server, serve
from tests.engine.hosting import Given
from tests.models import VOCAB_SIZE, make_tokenizer

MODEL_LEN = 400


def save_adapter(folder: Path, shape: BaseShape, *, seed: int = 0, rank: int = 4) -> Path:
    """Write a random adapter of all linears, small enough that answers stay finite."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(shape.num_layers):
        for linear, (n, k) in shape.linears.items():
            a, b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
            factors[layer, linear] = LoraFactors(a * 0.1, b * 0.1, 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    adapter_format.write(folder, AdapterWeights(factors))
    return folder


def zipped(folder: Path) -> bytes:
    """The folder's files as a .zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return packed.getvalue()


def tarred(folder: Path, mode: str = "w:gz") -> bytes:
    """The folder as a .tar.gz with the folder itself around its files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
        archive.add(folder, folder.name)
    return packed.getvalue()


def live_services(
    folder: Path, decoder: Decoder, *, max_bytes: int = 4 << 20, roots: tuple[Path, ...] = (), keys: Keys | None = None
) -> Services:
    """Services that answer with ``decoder``; everything they keep is below ``folder``."""
    base = BaseModel(("tiny",), "random", decoder.base_shape.fingerprint, VOCAB_SIZE, created_at=1)
    registry = AdapterRegistry(folder / "registry.db", reserved=base.names)
    store = AdapterStore(folder / "store")
    store.sweep(registry.digests_in_use())
    sources = AdapterSources(roots, max_bytes=max_bytes, allow_hub=False)
    metrics = Metrics(model_name=base.name, names=lambda: adapter_names(registry))
    limits = EngineLimits(
        max_model_len=MODEL_LEN,
        kv_blocks=129,
        block_size=16,
        adapter_bytes=1 << 20,
        host_adapter_bytes=1 << 20,
        max_running=8,
        max_batched_tokens=256,
    )

    def build(wake: Any) -> Engine:
        return Engine(decoder, decoder.base_shape, store.locate, limits, frozenset(), wake=wake)

    host = EngineThread(Given(build))
    host.load()
    return Services(
        worker=Worker(
            host, max_model_len=MODEL_LEN, max_waiting=64, max_waiting_tokens=100_000, on_report=metrics.on_report
        ),
        registry=registry,
        installer=AdapterInstaller(store, registry, sources, decoder.base_shape),
        tokenizer=Tokenizer(make_tokenizer()),
        base=base,
        keys=keys or Keys(loopback=True),
        metrics=metrics,
    )


@contextmanager
def live_server(folder: Path, decoder: Decoder, **options: Any) -> Iterator[Server]:
    """A running server over ``live_services``."""
    with serve(live_services(folder, decoder, **options)) as server:
        yield server


def files_below(folder: Path) -> set[str]:
    """Every file and folder that an upload could have left in a store."""
    store = folder / "store"
    return {str(path.relative_to(store)) for path in store.rglob("*")} - {"adapters", "incoming"}
