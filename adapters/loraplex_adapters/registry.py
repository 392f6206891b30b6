"""Names, versions and aliases of adapters: the one mutable truth, in sqlite, surviving restarts and kills."""

import re
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapters.errors import AdapterNameTaken, AdapterNotFound, AdapterPinned, InvalidAdapter, StoreFull
from loraplex_adapters.names import Adapter, AdapterVersion, NameEntry, Names

__all__ = ["MODES", "Adapter", "AdapterRegistry", "AdapterVersion"]

MODES = ("auto", "unmerged", "merged")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:/-]{0,127}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS adapters (
  name TEXT PRIMARY KEY, version INTEGER NOT NULL, pinned INTEGER NOT NULL, default_mode TEXT NOT NULL,
  created_at REAL NOT NULL, updated_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS versions (
  name TEXT NOT NULL REFERENCES adapters(name) ON DELETE CASCADE, version INTEGER NOT NULL,
  digest TEXT NOT NULL, created_at REAL NOT NULL, source TEXT, PRIMARY KEY (name, version)
) STRICT;
CREATE TABLE IF NOT EXISTS aliases (
  alias TEXT PRIMARY KEY, name TEXT NOT NULL REFERENCES adapters(name) ON DELETE CASCADE
) STRICT;
"""

_Adapters = list[Adapter]
_Versions = list[AdapterVersion]


class AdapterRegistry:
    """Adapter names in the database at ``path``. Safe for several threads; reads touch memory only.

    ``reserved`` names (the base's own) can be neither published nor made aliases.
    """

    def __init__(self, path: Path, *, reserved: Collection[str] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reserved = frozenset(reserved)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)
        self._names = self._load_all()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Reads

    def resolve(self, selector: str) -> Adapter:
        """The adapter that ``name``, ``alias``, ``name@version`` or ``name@digestprefix`` stands for.

        Raises: AdapterNotFound, naming close names.
        """
        return self._names.resolve(selector)

    def versions(self, name: str) -> _Versions:
        """All versions of a name, oldest first. Raises AdapterNotFound."""
        return [*self._names.entry(name).versions]

    def list(self) -> _Adapters:
        """All adapters by name."""
        return [entry.adapter for _, entry in sorted(self._names.entries.items())]

    def digests_in_use(self) -> set[str]:
        """The digests of all versions of all names."""
        return {version.digest for entry in self._names.entries.values() for version in entry.versions}

    def check_name(self, name: str) -> None:
        """Raise InvalidAdapter or AdapterNameTaken unless ``name`` may be published."""
        if not _NAME.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
            raise InvalidAdapter(
                f"{name[:140]!r} is not an adapter name: use 1 to 128 of A-Z a-z 0-9 . _ : / -, beginning with a letter, "
                "a digit or '_', without empty, '.' or '..' parts.",
                code="adapter_name_invalid",
            )
        if name in self._reserved:
            raise AdapterNameTaken(f"{name!r} is the base model's name; choose another.")
        if owner := self._names.aliases.get(name):
            raise AdapterNameTaken(f"{name!r} is an alias of {owner!r}; choose another name or drop the alias.")

    # Writes

    def publish(
        self, name: str, digest: str, *, replace: bool = False, source: str | None = None, pinned: bool | None = None
    ) -> Adapter:
        """Let ``name`` stand for ``digest``. The same digest again changes nothing (but ``pinned``, if given).

        Raises: AdapterNameTaken if the name stands for other content and ``replace`` is False, or is reserved.
        """
        with self._lock:
            self.check_name(name)
            entry = self._names.entries.get(name)
            if entry is not None and entry.adapter.digest == digest:
                return entry.adapter if pinned is None else self.update(name, pinned=pinned)
            if entry is not None and not replace:
                raise AdapterNameTaken(
                    f"{name!r} already stands for other content ({entry.adapter.digest[:12]}, version "
                    f"{entry.adapter.version}). Publish it with replace, or under another name."
                )
            now = time.time()
            version = 1 + max((v.version for v in entry.versions), default=0) if entry else 1
            with self._transaction() as db:
                db.execute(
                    "INSERT INTO adapters VALUES (?, ?, ?, 'auto', ?, ?) ON CONFLICT (name) DO UPDATE SET "
                    "version = excluded.version, updated_at = excluded.updated_at, pinned = coalesce(?, pinned)",
                    (name, version, bool(pinned), now, now, pinned),
                )
                db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", (name, version, digest, now, source))
            return self._refresh(name)

    def update(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        default_mode: str | None = None,
        alias: str | None = None,
        version: int | None = None,
    ) -> Adapter:
        """Change what is given: pin or unpin, the default mode, add an alias, go back or forward to a version.

        Raises: AdapterNotFound, AdapterNameTaken (the alias stands for something else), InvalidAdapter.
        """
        with self._lock:
            entry = self._names.entry(name)
            name = entry.adapter.name
            if default_mode is not None and default_mode not in MODES:
                raise InvalidAdapter(f"default_mode must be one of {', '.join(MODES)}.", code="mode_invalid")
            if version is not None:
                entry.select(str(version), only_version=True)
            new_alias = alias is not None and self._names.aliases.get(alias) != name
            if alias is not None and new_alias:
                self.check_name(alias)
                if alias in self._names.entries:
                    raise AdapterNameTaken(f"{alias!r} is an adapter's name already and cannot be an alias.")
            with self._transaction() as db:
                db.execute(
                    "UPDATE adapters SET pinned = coalesce(?, pinned), default_mode = coalesce(?, default_mode), "
                    "version = coalesce(?, version), updated_at = ? WHERE name = ?",
                    (pinned, default_mode, version, time.time(), name),
                )
                if new_alias:
                    db.execute("INSERT INTO aliases VALUES (?, ?)", (alias, name))
            return self._refresh(name)

    def drop_alias(self, alias: str) -> Adapter:
        """Remove an alias; the adapter it stood for. Raises AdapterNotFound."""
        with self._lock:
            name = self._names.aliases.get(alias)
            if name is None:
                raise AdapterNotFound(f"{alias[:140]!r} is not an alias.")
            with self._transaction() as db:
                db.execute("DELETE FROM aliases WHERE alias = ?", (alias,))
            return self._refresh(name)

    def retire(self, name: str) -> Adapter:
        """Forget a name, its versions and its aliases; the adapter as it was.

        Raises: AdapterNotFound, AdapterPinned.
        """
        with self._lock:
            adapter = self._names.entry(name).adapter
            if adapter.pinned:
                raise AdapterPinned(f"{adapter.name!r} is pinned; unpin it before you retire it.")
            with self._transaction() as db:
                db.execute("DELETE FROM adapters WHERE name = ?", (adapter.name,))
            self._names = self._names.replaced(adapter.name, None)
            return adapter

    # Inside

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StoreFull("The disk of the adapter registry is full; delete adapters or make room.") from error
            raise

    def _load_all(self) -> Names:
        names = [name for (name,) in self._db.execute("SELECT name FROM adapters")]
        entries = {name: self._load(name) for name in names}
        return Names(entries, dict(self._db.execute("SELECT alias, name FROM aliases")))

    def _load(self, name: str) -> NameEntry:
        version, pinned, mode, created_at, updated_at = self._db.execute(
            "SELECT version, pinned, default_mode, created_at, updated_at FROM adapters WHERE name = ?", (name,)
        ).fetchone()
        rows = self._db.execute(
            "SELECT version, digest, created_at, source FROM versions WHERE name = ? ORDER BY version", (name,)
        )
        versions = tuple(AdapterVersion(*row) for row in rows)
        aliases = self._db.execute("SELECT alias FROM aliases WHERE name = ? ORDER BY alias", (name,))
        current = next(v for v in versions if v.version == version)
        adapter = Adapter(
            name=name,
            digest=current.digest,
            version=version,
            pinned=bool(pinned),
            default_mode=mode,
            created_at=created_at,
            updated_at=updated_at,
            source=current.source,
            aliases=tuple(alias for (alias,) in aliases),
        )
        return NameEntry(adapter, versions)

    def _refresh(self, name: str) -> Adapter:
        """Show readers what the database now says about ``name``."""
        entry = self._load(name)
        self._names = self._names.replaced(name, entry)
        return entry.adapter
