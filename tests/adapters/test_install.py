"""The one front door: whatever comes in is whole and named, or leaves no trace."""

import io
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterError, AdapterNameTaken, AdapterTooLarge, InvalidAdapter
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.manifest import Manifest
from loraplex_adapters.registry import Adapter, AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore
from tests.adapters.making import CONFIG, WEIGHTS, edit_tensors, random_weights, save_random, tensor_name
from tests.adapters.test_archives import make_tar, make_zip


@pytest.fixture
def installer(tmp_path: Path, store: AdapterStore, base: BaseShape) -> AdapterInstaller:
    registry = AdapterRegistry(tmp_path / "registry.db", reserved={"base"})
    return AdapterInstaller(store, registry, AdapterSources((tmp_path / "allowed",), max_bytes=1 << 24), base)


def members(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def streams(folder: Path) -> list[tuple[str, io.BytesIO]]:
    return [(name, io.BytesIO(content)) for name, content in members(folder)]


def install(installer: AdapterInstaller, way: str, folder: Path) -> tuple[Adapter, Manifest, bool]:
    if way == "path":
        return installer.install_path("sql", folder)
    if way == "source":
        return installer.install_source("sql", str(folder))
    if way == "zip":
        return installer.install_archive("sql", io.BytesIO(make_zip(members(folder))))
    if way == "tar":
        return installer.install_archive("sql", io.BytesIO(make_tar(members(folder), "w:gz")))
    return installer.install_files("sql", streams(folder))


def is_clean(installer: AdapterInstaller) -> bool:
    return (
        installer.store.digests() == installer.registry.digests_in_use()
        and list((installer.store.root / "incoming").iterdir()) == []
    )


@pytest.mark.parametrize("way", ["path", "source", "zip", "tar", "files"])
def test_every_way_in_gives_the_same_adapter(installer: AdapterInstaller, tmp_path: Path, way: str) -> None:
    folder = save_random(tmp_path / "allowed" / "sql")
    adapter, manifest, created = install(installer, way, folder)

    assert created
    assert adapter == installer.registry.resolve("sql")
    assert adapter.digest == manifest.digest
    assert adapter.source == (str(folder) if way in ("path", "source") else "upload")
    opened = installer.store.open(adapter.digest)
    assert torch.equal(opened.factors[0, "q_proj"].a, random_weights().factors[0, "q_proj"].a)
    assert is_clean(installer)


def test_again_is_the_same_and_other_content_needs_replace(installer: AdapterInstaller, tmp_path: Path) -> None:
    one, two = save_random(tmp_path / "one", seed=1), save_random(tmp_path / "two", seed=2)
    first, _, _ = installer.install_path("sql", one)

    again, _, created = installer.install_path("sql", one)
    assert (again, created) == (first, False)
    with pytest.raises(AdapterNameTaken):
        installer.install_path("sql", two)
    assert is_clean(installer)
    replaced, _, created = installer.install_path("sql", two, replace=True, pinned=True)
    assert (replaced.version, replaced.pinned, created) == (2, True, True)
    assert installer.store.digests() == {first.digest, replaced.digest}


def test_a_shared_digest_outlives_one_of_its_names(installer: AdapterInstaller, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "one")
    digest = installer.install_path("a", folder)[0].digest
    installer.install_path("b", folder)

    installer.registry.retire("a")
    assert installer.discard_unused() == set()
    installer.registry.retire("b")
    assert installer.discard_unused(keep={digest}) == set()
    assert installer.discard_unused() == {digest}
    assert is_clean(installer)


@pytest.mark.parametrize("name", ["base", "no spaces", "a@1"])
def test_bad_names_are_refused_before_anything_is_read(installer: AdapterInstaller, name: str) -> None:
    class Untouchable(io.BytesIO):
        def seek(self, *args: Any) -> int:
            raise AssertionError("the upload was touched")

    with pytest.raises(AdapterError):
        installer.install_archive(name, Untouchable())


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt", WEIGHTS, CONFIG]
)
@pytest.mark.parametrize("way", ["zip", "tar", "files"])
def test_pickles_never_fire(installer: AdapterInstaller, tmp_path: Path, name: str, way: str) -> None:
    """P2: a pickle is refused under its own name and under any other."""
    trace = tmp_path / "fired"
    saved_by_torch = io.BytesIO()
    torch.save(Canary(trace), saved_by_torch)
    for content in (pickle.dumps(Canary(trace)), saved_by_torch.getvalue()):
        folder = save_random(tmp_path / "adapter")
        (folder / name).write_bytes(content)

        with pytest.raises(InvalidAdapter) as refusal:
            install(installer, way, folder)

        if name not in (WEIGHTS, CONFIG):
            assert refusal.value.code == "pickle_refused"
            assert name in str(refusal.value)
        shutil.rmtree(folder)
    assert not trace.exists()
    assert is_clean(installer)
    pickle.loads(pickle.dumps(Canary(trace)))  # noqa: S301 - the canary does sing
    assert trace.exists()


def test_a_failed_upload_hurts_nobody(installer: AdapterInstaller, tmp_path: Path) -> None:
    """P13: whatever is wrong with an upload, the adapter of that name and all others stay as they were."""
    good = save_random(tmp_path / "good", seed=1)
    installer.install_path("sql", good)
    before = installer.registry.list(), installer.store.digests()
    nan = edit_tensors(save_random(tmp_path / "nan"), {tensor_name(0, "q_proj", "A"): torch.full((2, 32), torch.nan)})
    cut = save_random(tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-1])

    for folder in (nan, cut, tmp_path / "missing"):
        with pytest.raises(AdapterError):
            installer.install_path("sql", folder, replace=True)
    with pytest.raises(AdapterError):
        installer.install_archive("sql", io.BytesIO(b"nonsense"), replace=True)
    with pytest.raises(AdapterTooLarge):
        installer.install_files("sql", [("huge", io.BytesIO(bytes((1 << 24) + 1)))], replace=True)

    assert (installer.registry.list(), installer.store.digests()) == before
    assert is_clean(installer)


def test_a_broken_stream_leaves_nothing(installer: AdapterInstaller) -> None:
    class Dropped(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        installer.install_files("sql", [(CONFIG, Dropped())])
    assert is_clean(installer)


def test_many_installs_at_once(installer: AdapterInstaller, tmp_path: Path) -> None:
    folders = [save_random(tmp_path / str(seed), seed=seed) for seed in range(4)]

    def install_some(i: int) -> None:
        installer.install_path(f"name-{i % 6}", folders[i % 4], replace=True)
        installer.discard_unused()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(install_some, range(48)))

    assert is_clean(installer)
    for adapter in installer.registry.list():
        assert installer.store.open(adapter.digest).max_rank == 2
        assert installer.registry.digests_in_use() >= {v.digest for v in installer.registry.versions(adapter.name)}
