"""The store keeps whole adapters only, each once, under the digest of what it computes."""

import errno
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterNotFound, InvalidAdapter, StoreFull, WrongBase
from loraplex_adapters.manifest import MANIFEST_NAME, Manifest, digest_of
from loraplex_adapters.store import AdapterStore
from tests.adapters.making import (
    WEIGHTS,
    edit_config,
    edit_tensors,
    random_weights,
    save_random,
    tensor_name,
    tiny_base,
)


def commit(store: AdapterStore, folder: Path, base: BaseShape) -> Manifest:
    with store.stage() as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        return store.commit(staged, base, source="test")


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_committed_adapter_reads_back(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    expected = random_weights()
    save_random(folder)
    (folder / "README.md").write_text("# Mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (folder / "checkpoint-1").mkdir()

    manifest = commit(store, folder, base)

    assert store.digests() == {manifest.digest}
    assert store.manifest(manifest.digest) == manifest
    opened = store.open(manifest.digest)
    assert all(torch.equal(opened.factors[m].a, expected.factors[m].a) for m in expected.factors)
    kept = ["README.md", "adapter_config.json", "adapter_model.safetensors", MANIFEST_NAME]
    assert files_below(store.root) == [f"adapters/{manifest.digest}/{name}" for name in kept]
    assert (manifest.min_rank, manifest.max_rank, manifest.alpha) == (2, 2, 1.0)
    assert manifest.num_parameters == expected.num_parameters
    assert manifest.num_bytes == expected.num_bytes
    assert manifest.source == "test"
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_same_content_is_stored_once(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    save_random(folder)

    assert commit(store, folder, base) == commit(store, folder, base)
    assert len(store.digests()) == 1


def test_the_digest_is_of_what_the_adapter_computes(folder: Path) -> None:
    digest = digest_of(save_random(folder))
    tensors = load_file(folder / WEIGHTS)

    edit_config(folder, lora_dropout=0.3, peft_version="9", inference_mode=False)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"other": "metadata"})
    assert digest_of(folder) == digest
    save_file({name.removeprefix("base_model.model."): t for name, t in tensors.items()}, folder / WEIGHTS)
    assert digest_of(folder) == digest

    edit_config(folder, lora_alpha=1.5)
    assert digest_of(folder) != digest
    edit_config(folder, lora_alpha=1.0)
    assert digest_of(folder) == digest
    changed = tensors[tensor_name(1, "v_proj", "B")].clone()
    changed[0, 0] += 1e-3
    edit_tensors(folder, {tensor_name(1, "v_proj", "B").removeprefix("base_model.model."): changed})
    assert digest_of(folder) != digest


def test_a_refused_adapter_leaves_nothing(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    edit_tensors(save_random(folder), {tensor_name(0, "q_proj", "A"): torch.full((2, 32), float("nan"))})

    with pytest.raises(InvalidAdapter):
        commit(store, folder, base)

    assert files_below(store.root) == []
    assert list((store.root / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "x.PKL", "deep/rng_state.pth"]
)
def test_pickles_are_refused_beside_good_weights(store: AdapterStore, folder: Path, base: BaseShape, name: str) -> None:
    path = save_random(folder) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")

    with pytest.raises(InvalidAdapter, match=path.name) as refusal:
        commit(store, folder, base)

    assert refusal.value.code == "pickle_refused"
    assert store.digests() == set()


def test_links_in_the_staged_folder_are_not_followed(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    save_random(folder)
    with store.stage() as staged:
        for path in folder.iterdir():
            (staged / path.name).symlink_to(path)
        with pytest.raises(InvalidAdapter):
            store.commit(staged, base)
    assert store.digests() == set()


def test_a_manifest_for_another_base_is_refused(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    manifest = commit(store, save_random(folder), tiny_base("a" * 64))
    (folder / MANIFEST_NAME).write_text(manifest.to_json())

    with pytest.raises(WrongBase):
        commit(store, folder, base)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"digest": 1}', "[" * 100_000])
def test_a_broken_manifest_is_refused(store: AdapterStore, folder: Path, base: BaseShape, text: str) -> None:
    (save_random(folder) / MANIFEST_NAME).write_text(text)

    with pytest.raises(InvalidAdapter) as refusal:
        commit(store, folder, base)

    assert refusal.value.code == "manifest_invalid"


def test_content_stored_for_another_base_is_refused(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    commit(store, save_random(folder), tiny_base("a" * 64))

    with pytest.raises(WrongBase):
        commit(store, folder, base)


def test_delete_keeps_open_maps_readable(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    manifest = commit(store, save_random(folder), base)
    weights = store.open(manifest.digest)

    store.delete(manifest.digest)

    assert torch.equal(weights.factors[2, "down_proj"].b, random_weights().factors[2, "down_proj"].b)
    assert files_below(store.root) == []
    with pytest.raises(AdapterNotFound):
        store.open(manifest.digest)
    with pytest.raises(AdapterNotFound):
        store.manifest(manifest.digest)
    with pytest.raises(AdapterNotFound):
        store.delete(manifest.digest)


@pytest.mark.parametrize("digest", ["", "..", "../incoming", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_digests_name_adapters(store: AdapterStore, digest: str) -> None:
    with pytest.raises(AdapterNotFound):
        store.path(digest)


def test_sweep_keeps_what_is_named(store: AdapterStore, tmp_path: Path, base: BaseShape) -> None:
    kept = commit(store, save_random(tmp_path / "kept", seed=1), base).digest
    dropped = commit(store, save_random(tmp_path / "dropped", seed=2), base).digest
    (store.root / "incoming" / "half").mkdir()
    (store.root / "incoming" / "half" / WEIGHTS).write_bytes(b"x")

    assert AdapterStore(store.root).sweep({kept}) == {dropped}

    assert store.digests() == {kept}
    assert list((store.root / "incoming").iterdir()) == []


def test_a_full_disk_is_named(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(StoreFull), store.stage(num_bytes=10):
        pass
    monkeypatch.undo()

    def fill_the_disk() -> None:
        with store.stage() as staged:
            (staged / "half").write_bytes(b"x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreFull):
        fill_the_disk()
    assert list((store.root / "incoming").iterdir()) == []


def test_many_threads_commit_the_same_content(store: AdapterStore, folder: Path, base: BaseShape) -> None:
    save_random(folder)

    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda _: commit(store, folder, base), range(16)))

    assert {manifest.digest for manifest in manifests} == store.digests()
    assert list((store.root / "incoming").iterdir()) == []
    assert adapter_format.read(store.path(manifests[0].digest), base).max_rank == 2
