"""All adapter names at one moment, and what a request's ``model`` stands for among them."""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from loraplex_adapters.errors import AdapterNotFound

_MAX_SELECTOR_CHARS = 256
_MAX_NAMES_COMPARED = 200  # on the road of every request for an unknown model: a few milliseconds
_MAX_CHARS_COMPARED = 64
_MIN_DIGEST_PREFIX = 4


@dataclass(frozen=True)
class AdapterVersion:
    """One content that a name has stood for. ``created_at`` is Unix time in seconds."""

    version: int
    digest: str
    created_at: float
    source: str | None


@dataclass(frozen=True)
class Adapter:
    """A name and the version of it that answers. Times are Unix times in seconds."""

    name: str
    digest: str
    version: int
    pinned: bool
    default_mode: str
    created_at: float
    updated_at: float
    source: str | None
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class NameEntry:
    adapter: Adapter
    versions: tuple[AdapterVersion, ...]

    def select(self, wanted: str, *, only_version: bool = False) -> AdapterVersion:
        """The version that a number or a digest's first characters (four at least) name. Raises AdapterNotFound."""
        for version in self.versions:
            if str(version.version) == wanted:
                return version
        if not only_version and len(wanted) >= _MIN_DIGEST_PREFIX:
            found = {v.digest: v for v in self.versions if v.digest.startswith(wanted.lower())}
            if len(found) == 1:
                return next(iter(found.values()))
        known = ", ".join(f"{v.version} ({v.digest[:12]})" for v in self.versions[-10:])
        raise AdapterNotFound(
            f"{self.adapter.name!r} has no version {wanted[:64]!r}; it has {known}.", code="version_not_found"
        )


@dataclass(frozen=True)
class Names:
    """Immutable: readers take it without a lock, writers replace it."""

    entries: Mapping[str, NameEntry]
    aliases: Mapping[str, str]

    def find(self, name: str) -> NameEntry | None:
        return self.entries.get(self.aliases.get(name, name))

    def resolve(self, selector: str) -> Adapter:
        """What ``name``, ``alias``, ``name@version`` or ``name@digestprefix`` stands for. Raises AdapterNotFound."""
        name, _, wanted = selector.partition("@")
        if len(selector) > _MAX_SELECTOR_CHARS or (entry := self.find(name)) is None:
            raise self._unknown(selector)
        if "@" not in selector:
            return entry.adapter
        version = entry.select(wanted)
        return replace(entry.adapter, digest=version.digest, version=version.version, source=version.source)

    def entry(self, name: str) -> NameEntry:
        """The entry of a name or alias. Raises AdapterNotFound, naming close names."""
        entry = self.find(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    def replaced(self, name: str, entry: NameEntry | None) -> "Names":
        """A copy in which ``name`` has that entry, or is gone."""
        entries = {**self.entries}
        aliases = {alias: owner for alias, owner in self.aliases.items() if owner != name}
        if entry is None:
            del entries[name]
        else:
            entries[name] = entry
            aliases |= dict.fromkeys(entry.adapter.aliases, name)
        return Names(entries, aliases)

    def _unknown(self, name: str) -> AdapterNotFound:
        shown = name[:140]
        alike = (known for known in itertools.chain(self.entries, self.aliases) if known[:1] == name[:1])
        close = difflib.get_close_matches(
            name[:_MAX_CHARS_COMPARED], list(itertools.islice(alike, _MAX_NAMES_COMPARED))
        )
        hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
        return AdapterNotFound(f"There is no adapter named {shown!r}.{hint}")
