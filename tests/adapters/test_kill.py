"""P8: an upload is all or nothing, wherever the process is killed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore
from tests.adapters.making import random_weights, save_random

# For n = 1, 2, ...: a forked process installs the folder "old" and then "new" as "name" below data-n, and kills itself at
# the n-th call of the second install that changes what lasts, or just after it. Ends with the first n that is never
# reached, and prints it.
UPLOADER = """
import io, os, signal, sys
from pathlib import Path
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore
from tests.adapters.making import tiny_base

root = Path(sys.argv[1])

class DeadlyDatabase:
    def __init__(self, db, deadly):
        self.db = db
        self.execute = deadly(db.execute)
    def __getattr__(self, name):
        return getattr(self.db, name)

def upload(fatal):
    calls = 0
    def step():
        nonlocal calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    def deadly(function):
        def call(*args, **kwargs):
            step()
            result = function(*args, **kwargs)
            step()
            return result
        return call

    data = root / f"data-{fatal}"
    registry = AdapterRegistry(data / "registry.db")
    installer = AdapterInstaller(AdapterStore(data / "store"), registry, AdapterSources(), tiny_base())
    installer.install_path("name", root / "old")
    files = [(path.name, io.BytesIO(path.read_bytes())) for path in sorted((root / "new").iterdir())]
    for name in ("fsync", "rename", "mkdir", "chmod", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    io.open = deadly(io.open)
    registry._db = DeadlyDatabase(registry._db, deadly)
    installer.install_files("name", files, replace=True)

fatal = 1
while True:
    child = os.fork()
    if child == 0:
        upload(fatal)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(status) if status else print(fatal)
        break
    fatal += 1
"""


def restart(data: Path, base: BaseShape) -> AdapterInstaller:
    registry = AdapterRegistry(data / "registry.db")
    store = AdapterStore(data / "store")
    store.sweep(registry.digests_in_use())
    return AdapterInstaller(store, registry, AdapterSources(), base)


@pytest.mark.slow
def test_an_upload_is_all_or_nothing(tmp_path: Path, base: BaseShape) -> None:
    save_random(tmp_path / "old", seed=1)
    new = save_random(tmp_path / "new", seed=2)
    command = [sys.executable, "-c", UPLOADER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    num_points = int(done.stdout) - 1
    assert num_points > 40

    outcomes = set()
    for fatal in range(1, num_points + 1):
        data = tmp_path / f"data-{fatal}"
        after = restart(data, base)
        adapter = after.registry.resolve("name")
        expected = random_weights(seed=adapter.version)
        weights = after.store.open(adapter.digest)

        assert all(torch.equal(weights.factors[m].b, expected.factors[m].b) for m in expected.factors)
        assert after.store.digests() == after.registry.digests_in_use()
        assert list((data / "store" / "incoming").iterdir()) == []
        _, _, created = after.install_path("name", new, replace=True)  # the next upload works
        assert created == (adapter.version == 1)
        after.registry.close()
        outcomes.add(adapter.version)
    assert outcomes == {1, 2}


def test_everything_is_on_disk_before_it_is_visible(
    tmp_path: Path, base: BaseShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves the page cache alone and a power cut does not: files and folders are synced around the rename."""
    installer = restart(tmp_path / "data", base)
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def seen_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def seen_rename(source: Path, target: Path) -> None:
        events.append(f"rename of {source.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "rename", seen_rename)
    installer.install_path("name", save_random(tmp_path / "adapter"))

    at = next(i for i, event in enumerate(events) if event.startswith("rename of"))
    staged = events[at].removeprefix("rename of ")
    assert sorted(events[: at - 1]) == ["adapter_config.json", "adapter_model.safetensors", "loraplex_adapter.json"]
    assert events[at - 1] == staged
    assert events[at + 1 :] == ["adapters"]


def test_a_failing_publication_keeps_nothing(tmp_path: Path, base: BaseShape) -> None:
    installer = restart(tmp_path / "data", base)
    installer.registry.close()

    files = [(p.name, io.BytesIO(p.read_bytes())) for p in save_random(tmp_path / "adapter").iterdir()]
    with pytest.raises(Exception, match="closed"):
        installer.install_files("name", files)

    assert installer.store.digests() == set()
    with pytest.raises(AdapterNotFound):
        installer.registry.resolve("name")
