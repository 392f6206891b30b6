"""Names, versions and aliases: one durable truth that many threads may use."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex_adapters.errors import AdapterNameTaken, AdapterNotFound, AdapterPinned, InvalidAdapter
from loraplex_adapters.registry import AdapterRegistry

A, B, C = "a" * 64, "ab" * 32, "c" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    registry = AdapterRegistry(tmp_path / "registry.db", reserved={"base", "org/base"})
    yield registry
    registry.close()


def test_publish_resolve_retire(registry: AdapterRegistry) -> None:
    published = registry.publish("sql", A, source="upload")

    assert registry.resolve("sql") == published
    assert (published.version, published.pinned, published.default_mode, published.source) == (
        1,
        False,
        "auto",
        "upload",
    )
    assert abs(published.created_at - time.time()) < 60
    assert registry.list() == [published]
    assert registry.retire("sql") == published
    assert registry.list() == []
    with pytest.raises(AdapterNotFound):
        registry.resolve("sql")


def test_the_same_content_again_is_no_new_version(registry: AdapterRegistry) -> None:
    first = registry.publish("sql", A)

    assert registry.publish("sql", A, source="elsewhere") == first
    assert len(registry.versions("sql")) == 1
    assert registry.publish("sql", A, pinned=True).pinned


def test_other_content_needs_replace(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)

    with pytest.raises(AdapterNameTaken, match="replace"):
        registry.publish("sql", B)
    assert registry.publish("sql", B, replace=True).version == 2
    assert registry.resolve("sql").digest == B
    assert [version.digest for version in registry.versions("sql")] == [A, B]
    assert registry.digests_in_use() == {A, B}


def test_replacing_keeps_pin_mode_and_aliases(registry: AdapterRegistry) -> None:
    registry.publish("sql", A, pinned=True)
    registry.update("sql", default_mode="merged", alias="db")

    replaced = registry.publish("sql", B, replace=True)

    assert (replaced.pinned, replaced.default_mode, replaced.aliases) == (True, "merged", ("db",))


def test_versions_are_selected_by_number_and_digest(registry: AdapterRegistry) -> None:
    registry.publish("sql", A, source="one")
    registry.publish("sql", B, replace=True, source="two")
    registry.update("sql", alias="db")

    assert registry.resolve("sql@1").digest == A
    assert registry.resolve("sql@1").source == "one"
    assert registry.resolve("db@2").digest == B
    assert registry.resolve("sql@aaaa").version == 1
    assert registry.resolve(f"sql@{B}").version == 2
    for selector in ("sql@3", "sql@", "sql@aaa", "sql@zzzz", "sql@1@1", f"sql@{'a' * 999}"):
        with pytest.raises(AdapterNotFound):
            registry.resolve(selector)


def test_ambiguous_digest_prefixes_are_not_guessed(registry: AdapterRegistry) -> None:
    registry.publish("sql", "abcd1" + "0" * 59)
    registry.publish("sql", "abcd2" + "0" * 59, replace=True)

    with pytest.raises(AdapterNotFound):
        registry.resolve("sql@abcd")
    assert registry.resolve("sql@ABCD2").version == 2


def test_rolling_back_and_forward(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)
    registry.publish("sql", B, replace=True)

    assert registry.update("sql", version=1).digest == A
    assert registry.resolve("sql").digest == A
    assert registry.publish("sql", C, replace=True).version == 3
    with pytest.raises(AdapterNotFound, match=r"1 .*2 .*3"):
        registry.update("sql", version=4)


def test_aliases(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)
    registry.publish("haiku", B)

    assert registry.update("sql", alias="db").aliases == ("db",)
    assert registry.update("sql", alias="db").aliases == ("db",)
    assert registry.resolve("db").name == "sql"
    for taken in ("haiku", "base", "sql"):
        with pytest.raises(AdapterNameTaken):
            registry.update("sql", alias=taken)
    with pytest.raises(AdapterNameTaken):
        registry.update("haiku", alias="db")
    with pytest.raises(AdapterNameTaken):
        registry.publish("db", C)
    assert registry.drop_alias("db").aliases == ()
    with pytest.raises(AdapterNotFound):
        registry.resolve("db")
    with pytest.raises(AdapterNotFound):
        registry.drop_alias("db")


def test_aliases_go_with_their_name(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)
    registry.update("sql", alias="db")
    registry.retire("sql")

    assert registry.publish("db", B).version == 1
    assert registry.publish("sql", C).version == 1
    assert registry.digests_in_use() == {B, C}


def test_pinned_adapters_are_not_retired(registry: AdapterRegistry) -> None:
    registry.publish("sql", A, pinned=True)

    with pytest.raises(AdapterPinned):
        registry.retire("sql")
    registry.update("sql", pinned=False)
    registry.retire("sql")


def test_modes_are_checked(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)

    assert registry.update("sql", default_mode="unmerged").default_mode == "unmerged"
    with pytest.raises(InvalidAdapter, match="auto, unmerged, merged"):
        registry.update("sql", default_mode="fast")


@pytest.mark.parametrize("name", ["a", "ft:llama-8b:acme:sql:9xYz", "org/name", "a.b_c-d/e", "_a", "0", "x" * 128])
def test_good_names(registry: AdapterRegistry, name: str) -> None:
    registry.publish(name, A)
    registry.update(name, alias=f"z{name[1:]}") if name != "a" else None
    assert registry.resolve(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a@1",
        ".a",
        "-a",
        "/a",
        ":a",
        "a/",
        "a//b",
        "a/../b",
        "..",
        "a/.",
        "a\n",
        "a\0",
        "é",
        "x" * 129,
        "a%2e",
    ],
)
def test_bad_names(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        registry.publish(name, A)
    assert refusal.value.code == "adapter_name_invalid"


def test_reserved_names_are_taken(registry: AdapterRegistry) -> None:
    for name in ("base", "org/base"):
        with pytest.raises(AdapterNameTaken, match="base model"):
            registry.publish(name, A)


def test_close_names_are_suggested(registry: AdapterRegistry) -> None:
    registry.publish("customer-support", A)

    with pytest.raises(AdapterNotFound, match="Did you mean 'customer-support'"):
        registry.resolve("custommer-suport")


def test_unknown_names_are_answered_quickly_among_many(registry: AdapterRegistry) -> None:
    for i in range(250):
        registry.publish(f"{'long-name-' * 10}{i}", A)

    started = time.perf_counter()
    with pytest.raises(AdapterNotFound):
        registry.resolve("x" * 100_000)
    with pytest.raises(AdapterNotFound):
        registry.resolve("long-name-" * 12)
    assert time.perf_counter() - started < 1


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    registry = AdapterRegistry(path)
    registry.publish("sql", A, source="upload")
    registry.publish("sql", B, replace=True)
    registry.update("sql", pinned=True, default_mode="merged", alias="db", version=1)
    before = registry.list(), registry.versions("sql")
    # no close: as after a kill

    again = AdapterRegistry(path)

    assert (again.list(), again.versions("sql")) == before
    assert again.resolve("db").digest == A


def test_concurrent_publishes_lose_nothing(registry: AdapterRegistry) -> None:
    def publish(i: int) -> None:
        registry.publish(f"name-{i % 4}", f"{i:064x}", replace=True)
        registry.resolve(f"name-{i % 4}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(80)))

    for name in range(4):
        versions = registry.versions(f"name-{name}")
        assert [version.version for version in versions] == list(range(1, 21))
        assert registry.resolve(f"name-{name}").digest == versions[-1].digest
    assert len(registry.digests_in_use()) == 80


def test_one_of_many_wins_a_new_name(registry: AdapterRegistry) -> None:
    def publish(i: int) -> bool:
        try:
            registry.publish("contested", f"{i:064x}")
        except AdapterNameTaken:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(publish, range(32))) == 1


def test_a_failed_write_changes_nothing(registry: AdapterRegistry) -> None:
    registry.publish("sql", A)
    before = registry.list()

    with pytest.raises(AdapterNameTaken):
        registry.update("sql", pinned=True, default_mode="merged", alias="base")
    with pytest.raises(AdapterNotFound):
        registry.update("sql", pinned=True, version=7)

    assert registry.list() == before
