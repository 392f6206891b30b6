"""`client.adapters`: upload, list, change and delete adapters; needs the admin key if the server has one."""

from __future__ import annotations

import builtins
import os

from . import calls
from .connection import AsyncConnection, Connection
from .types import Adapter, AdapterDeleted, AdapterVersion
from .upload import AdapterFiles


class Adapters:
    """The server's adapters."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> builtins.list[Adapter]:
        """All adapters."""
        return self._connection.send(calls.list_adapters())

    def show(self, name: str) -> Adapter:
        """One adapter. Raises NotFoundError."""
        return self._connection.send(calls.show_adapter(name))

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        replace: bool = False,
        pinned: bool = False,
    ) -> Adapter:
        """Send a PEFT directory, or an archive of one; `name` defaults to that of the directory or archive.

        Raises LocalAdapterError: nothing to send. ConflictError: the name is taken by other content and not `replace`.
        UnprocessableError: the server refuses the adapter; the message has the reason.
        """
        return self._connection.send(calls.upload_adapter(AdapterFiles.at(path), name, replace, pinned))

    def load(self, source: str, *, name: str, replace: bool = False, pinned: bool = False) -> Adapter:
        """Have the server read an adapter: a path on its side, or `hf://owner/repo[@revision]`."""
        return self._connection.send(calls.load_adapter(source, name, replace, pinned))

    def update(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        default_mode: str | None = None,
        alias: str | None = None,
        version: int | str | None = None,
    ) -> Adapter:
        """Change what is given: keep it on the GPU, its default mode, one more name, or the current version."""
        return self._connection.send(
            calls.update_adapter(name, pinned=pinned, default_mode=default_mode, alias=alias, version=version)
        )

    def pin(self, name: str) -> Adapter:
        """Keep the adapter on the GPU."""
        return self.update(name, pinned=True)

    def unpin(self, name: str) -> Adapter:
        """Let the adapter leave the GPU when others need the room."""
        return self.update(name, pinned=False)

    def versions(self, name: str) -> builtins.list[AdapterVersion]:
        """All that was published under the name."""
        return self.show(name).versions

    def delete(self, name: str) -> AdapterDeleted:
        """Retire the name; returns when running requests have ended and the memory is free."""
        return self._connection.send(calls.delete_adapter(name))


class AsyncAdapters:
    """`Adapters`, awaited."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> builtins.list[Adapter]:
        """See `Adapters.list`."""
        return await self._connection.send(calls.list_adapters())

    async def show(self, name: str) -> Adapter:
        """See `Adapters.show`."""
        return await self._connection.send(calls.show_adapter(name))

    async def upload(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        replace: bool = False,
        pinned: bool = False,
    ) -> Adapter:
        """See `Adapters.upload`."""
        return await self._connection.send(calls.upload_adapter(AdapterFiles.at(path), name, replace, pinned))

    async def load(self, source: str, *, name: str, replace: bool = False, pinned: bool = False) -> Adapter:
        """See `Adapters.load`."""
        return await self._connection.send(calls.load_adapter(source, name, replace, pinned))

    async def update(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        default_mode: str | None = None,
        alias: str | None = None,
        version: int | str | None = None,
    ) -> Adapter:
        """See `Adapters.update`."""
        return await self._connection.send(
            calls.update_adapter(name, pinned=pinned, default_mode=default_mode, alias=alias, version=version)
        )

    async def pin(self, name: str) -> Adapter:
        """See `Adapters.pin`."""
        return await self.update(name, pinned=True)

    async def unpin(self, name: str) -> Adapter:
        """See `Adapters.unpin`."""
        return await self.update(name, pinned=False)

    async def versions(self, name: str) -> builtins.list[AdapterVersion]:
        """See `Adapters.versions`."""
        return (await self.show(name)).versions

    async def delete(self, name: str) -> AdapterDeleted:
        """See `Adapters.delete`."""
        return await self._connection.send(calls.delete_adapter(name))
