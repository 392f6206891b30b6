"""Where a client sends its calls, and with which keys: turns a `Call` into an HTTP request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from .calls import Call
from .errors import APIConnectionError, error_from_httpx
from .upload import FormFile

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Ten minutes between two bytes: a long prompt in a long queue; five seconds to connect."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address and the caller's keys; the keys never show in a repr."""

    base_url: str
    timeout: float | httpx.Timeout | None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        admin_key: str | None,
        timeout: float | httpx.Timeout | None,
        environ: Mapping[str, str] = os.environ,
    ) -> Endpoint:
        """Fill what is None from `LORAPLEX_BASE_URL`, `LORAPLEX_API_KEY` and `LORAPLEX_ADMIN_KEY`."""
        url = base_url or environ.get("LORAPLEX_BASE_URL") or DEFAULT_BASE_URL
        # OpenAI clients are given ".../v1"; the same value must work here, where some routes lie outside /v1.
        url = url.strip().rstrip("/").removesuffix("/v1")
        return cls(
            base_url=url,
            timeout=timeout,
            api_key=_key(api_key, environ.get("LORAPLEX_API_KEY")),
            admin_key=_key(admin_key, environ.get("LORAPLEX_ADMIN_KEY")),
        )

    def request(
        self, http: httpx.Client | httpx.AsyncClient, call: Call[Any], form_files: list[FormFile]
    ) -> httpx.Request:
        """The HTTP request for `call`, with the admin key where the call needs it.

        Raises APIConnectionError: the base URL is not a URL, or the key cannot be sent.
        """
        headers = {"User-Agent": "loraplex-client"}
        headers["Accept"] = "text/event-stream" if call.stream else "application/json, text/plain;q=0.9, */*;q=0.1"
        key = (self.admin_key or self.api_key) if call.admin else self.api_key
        if key is not None:
            # httpx would quote the whole key in its own error.
            if not (key.isascii() and key.isprintable()):
                raise APIConnectionError("the key has characters that an HTTP header cannot carry", transient=False)
            headers["Authorization"] = f"Bearer {key}"
        try:
            return http.build_request(
                call.method,
                self.base_url + call.path,
                json=call.json,
                data=call.form,
                files=form_files or None,
                headers=headers,
                timeout=self.timeout,
            )
        except httpx.InvalidURL as error:
            raise error_from_httpx(error, self.base_url) from error


def _key(given: str | None, from_environment: str | None) -> str | None:
    """A key pasted or read from a file often ends in a newline."""
    return ((given if given is not None else from_environment) or "").strip() or None
