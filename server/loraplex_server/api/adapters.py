"""The admin calls: add, show, change and delete adapters while others are served."""

import asyncio
from contextlib import ExitStack
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, field_validator
from starlette.responses import JSONResponse, Response

from loraplex_adapters.errors import AdapterNotFound, AdapterTooLarge
from loraplex_adapters.install import Installed
from loraplex_server.api.adapter_changes import Changes, apply_pins
from loraplex_server.api.adapter_view import show_adapter, show_version
from loraplex_server.api.body_limit import bounds_own_body
from loraplex_server.api.schemas import Body, Refused
from loraplex_server.api.upload import Upload, declared_bytes, receive_upload
from loraplex_server.auth import Access, access
from loraplex_server.errors import ApiError
from loraplex_server.services import Services, Uses

router = APIRouter(tags=["adapters"])

_MAX_JSON_BYTES = 64 << 10
_DRAIN_TIMEOUT_S = 300.0

Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Options(Body):
    """What both ways of adding an adapter have in common."""

    name: Name
    replace: bool = False
    pinned: bool | None = None
    warm: bool = False
    merge: Refused = None


class UploadForm(_Options):
    """The fields beside the files of a multipart upload."""


class NewAdapter(_Options):
    """An adapter that the server reads itself: a path below an allowed root, or ``hf://org/repo[@revision]``."""

    source: str = Field(min_length=1, max_length=4096)


class AdapterChange(Body):
    """What may be changed of an adapter; what is left out stays."""

    pinned: bool | None = None
    default_mode: Literal["auto", "unmerged", "merged"] | None = None
    alias: Name | None = None
    version: Annotated[int, Field(ge=1, le=2**53)] | None = None

    @field_validator("default_mode")
    @classmethod
    def _can_be_served(cls, mode: str | None) -> str | None:
        if mode == "merged":
            raise ValueError("merged serving is not supported; use auto or unmerged")
        return mode


@router.post("/v1/adapters", status_code=201, response_model=None)
@access(Access.ADMIN)
@bounds_own_body
async def create_adapter(request: Request, services: Uses, changes: Changes) -> Response:
    """Add an adapter, or publish new content under its name with ``replace``.

    Multipart: ``name`` and ``file`` (a .zip, .tar or .tar.gz) or several ``files``. JSON: ``name`` and ``source``.
    201; 200 if the name stood for this very content already.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    options: _Options
    if content_type == "multipart/form-data":
        options, installed = await _install_upload(request, services)
    elif content_type == "application/json":
        options, installed = await _install_source(request, services)
    else:
        raise ApiError(
            "Send multipart/form-data with `name` and `file` or `files`, or application/json with `name` and `source`.",
            status=415,
            code="unsupported_media_type",
        )
    adapter, _, is_new = installed
    apply_pins(services, (version.digest for version in services.registry.versions(adapter.name)))
    if options.warm or adapter.pinned:
        changes.warm(services, adapter.digest)
    return JSONResponse(
        await asyncio.to_thread(show_adapter, services, adapter),
        status_code=201 if is_new else 200,
        headers={"location": f"/v1/adapters/{quote(adapter.name)}"},
    )


@router.get("/v1/adapters")
@access(Access.ADMIN)
def list_adapters(services: Uses) -> dict[str, Any]:
    """All adapters by name."""
    data = []
    for adapter in services.registry.list():
        try:
            data.append(show_adapter(services, adapter))
        except AdapterNotFound:
            continue  # deleted since the list was made
    return {"object": "list", "data": data}


# Names may hold slashes, so the longer path comes first.
@router.get("/v1/adapters/{name:path}/versions")
@access(Access.ADMIN)
def list_versions(name: str, services: Uses) -> dict[str, Any]:
    """All that was published under a name, oldest first."""
    adapter = services.registry.resolve(name)
    versions = services.registry.versions(adapter.name)
    return {"object": "list", "data": [show_version(version, adapter) for version in versions]}


@router.get("/v1/adapters/{name:path}")
@access(Access.ADMIN)
def retrieve_adapter(name: str, services: Uses) -> dict[str, Any]:
    """One adapter, by name, alias or ``name@version``."""
    return show_adapter(services, services.registry.resolve(name))


@router.patch("/v1/adapters/{name:path}")
@access(Access.ADMIN)
async def update_adapter(name: str, change: AdapterChange, services: Uses, changes: Changes) -> dict[str, Any]:
    """Pin or unpin, set the default mode, add an alias, or go to another version."""
    if not change.model_dump(exclude_none=True):
        raise ApiError("Name what to change: pinned, default_mode, alias or version.", code="missing_field")
    adapter = await asyncio.to_thread(
        services.registry.update,
        name,
        pinned=change.pinned,
        default_mode=change.default_mode,
        alias=change.alias,
        version=change.version,
    )
    apply_pins(services, (version.digest for version in services.registry.versions(adapter.name)))
    if adapter.pinned:
        changes.warm(services, adapter.digest)
    return await asyncio.to_thread(show_adapter, services, adapter)


@router.delete("/v1/adapters/{name:path}", response_model=None)
@access(Access.ADMIN)
async def delete_adapter(
    name: str,
    services: Uses,
    changes: Changes,
    timeout_s: Annotated[float, Query(alias="timeout", ge=0, le=3600, allow_inf_nan=False)] = _DRAIN_TIMEOUT_S,
) -> Response:
    """Retire a name; answers when its last request has ended and its memory is free.

    202 if that takes longer than ``timeout`` seconds: the name is gone, the rest follows by itself. An alias is dropped
    alone.
    """
    adapter = services.registry.resolve(name)
    if name in adapter.aliases:
        await asyncio.to_thread(services.registry.drop_alias, name)
        return JSONResponse(_deleted(name, adapter.digest, freed_bytes=0))
    if name != adapter.name:
        raise ApiError(
            f"A single version cannot be deleted; delete the whole adapter {adapter.name!r}.",
            param="name",
            code="invalid_value",
        )
    retired = await changes.retire(services, name, timeout_s)
    if retired.freed_bytes is None:
        draining = {"object": "adapter", "name": name, "digest": adapter.digest, "state": "draining"}
        return JSONResponse(draining, status_code=202)
    return JSONResponse(_deleted(name, adapter.digest, retired.freed_bytes))


def _deleted(name: str, digest: str, freed_bytes: int) -> dict[str, Any]:
    return {"object": "adapter.deleted", "name": name, "deleted": True, "digest": digest, "freed_bytes": freed_bytes}


async def _install_upload(request: Request, services: Services) -> tuple[UploadForm, Installed]:
    installer = services.installer
    max_bytes = installer.sources.max_bytes
    with installer.store.stage(min(declared_bytes(request), max_bytes)) as staged:
        upload = await receive_upload(request, staged, max_bytes)
        form = _form_of(upload)
        return form, await asyncio.to_thread(_install_files, services, form, upload)


def _form_of(upload: Upload) -> UploadForm:
    if not upload.files:
        raise ApiError(
            "The form holds no file: send an archive as `file`, or the adapter's files as `files`.",
            param="file",
            code="missing_field",
        )
    if unknown := next((file.field for file in upload.files if file.field not in ("file", "files")), None):
        raise ApiError(f"Unknown field `{unknown[:64]}`.", param=unknown[:64], code="unknown_field")
    try:
        # Forms know text only: "true", "0".
        return UploadForm.model_validate(upload.fields)
    except ValidationError as error:
        raise _invalid_body(error) from None


def _install_files(services: Services, form: UploadForm, upload: Upload) -> Installed:
    """One `file` is an archive; everything else is the adapter's own files."""
    installer = services.installer
    if len(upload.files) == 1 and upload.files[0].field == "file":
        return installer.install_archive(form.name, upload.files[0].path, replace=form.replace, pinned=form.pinned)
    with ExitStack() as stack:
        files = [(file.filename, stack.enter_context(file.path.open("rb"))) for file in upload.files]
        return installer.install_files(form.name, files, replace=form.replace, pinned=form.pinned)


async def _install_source(request: Request, services: Services) -> tuple[NewAdapter, Installed]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_JSON_BYTES:
            raise AdapterTooLarge(
                f"The JSON body has more than {_MAX_JSON_BYTES} bytes; send an adapter's files as multipart/form-data.",
                code="body_too_large",
            )
    try:
        new = NewAdapter.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid_body(error) from None
    installed = await asyncio.to_thread(
        services.installer.install_source, new.name, new.source, replace=new.replace, pinned=new.pinned
    )
    return new, installed


def _invalid_body(error: ValidationError) -> RequestValidationError:
    return RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()])
