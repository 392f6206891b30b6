"""Sends calls over httpx, with retries: the only I/O of the package, once blocking and once async."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from .calls import Call
from .endpoint import Endpoint
from .errors import LoraplexError, error_from_httpx, error_from_response
from .retries import retry_delay_s
from .streaming import AsyncStream, Chunk, Stream
from .upload import FormFile

T = TypeVar("T")
C = TypeVar("C", bound=Chunk)

_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
"""Each open stream holds a connection; httpx's own limit of 100 would queue the streams of a load test."""


class Connection:
    """Sends calls through an `httpx.Client`; closes only a client of its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_retries: int,
        http_client: httpx.Client | None,
        transport: httpx.BaseTransport | None,
        sleep: Callable[[float], object] | None,
    ) -> None:
        self.endpoint = endpoint
        self._max_retries = max_retries
        self._owned = http_client is None
        self._http = http_client or httpx.Client(transport=transport, follow_redirects=True, limits=_LIMITS)
        self._sleep = sleep or time.sleep

    def send(self, call: Call[T]) -> T:
        """Send a call and read its answer. Raises LoraplexError."""
        return call.parse(self._respond(call))

    def stream(self, call: Call[Callable[[str], C]]) -> Stream[C]:
        """Send a call whose answer is a stream; retries end where the stream begins. Raises LoraplexError."""
        response = self._respond(call)
        try:
            return Stream(response, call.parse(response))
        except LoraplexError:
            response.close()
            raise

    def close(self) -> None:
        """Close the pool of connections."""
        if self._owned:
            self._http.close()

    def _respond(self, call: Call[T]) -> httpx.Response:
        if call.files is None:
            return self._try_often(call, [])
        with call.files.open() as form_files:
            return self._try_often(call, form_files)

    def _try_often(self, call: Call[T], form_files: list[FormFile]) -> httpx.Response:
        retries_taken = 0
        while True:
            answer = self._try_once(call, form_files)
            if isinstance(answer, httpx.Response):
                return answer
            delay_s = _delay_s(call, answer, retries_taken, self._max_retries)
            if delay_s is None:
                raise answer
            self._sleep(delay_s)
            retries_taken += 1

    def _try_once(self, call: Call[T], form_files: list[FormFile]) -> httpx.Response | LoraplexError:
        request = self.endpoint.request(self._http, call, form_files)
        try:
            response = self._http.send(request, stream=call.stream)
            if call.accepts(response):
                return response
            response.read()
        except httpx.RequestError as error:
            return _caused(error_from_httpx(error, self.endpoint.base_url), error)
        return error_from_response(response)


class AsyncConnection:
    """`Connection` over an `httpx.AsyncClient`."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_retries: int,
        http_client: httpx.AsyncClient | None,
        transport: httpx.AsyncBaseTransport | None,
        sleep: Callable[[float], Awaitable[object]] | None,
    ) -> None:
        self.endpoint = endpoint
        self._max_retries = max_retries
        self._owned = http_client is None
        self._http = http_client or httpx.AsyncClient(transport=transport, follow_redirects=True, limits=_LIMITS)
        self._sleep = sleep or asyncio.sleep

    async def send(self, call: Call[T]) -> T:
        """Send a call and read its answer. Raises LoraplexError."""
        return call.parse(await self._respond(call))

    async def stream(self, call: Call[Callable[[str], C]]) -> AsyncStream[C]:
        """Send a call whose answer is a stream; retries end where the stream begins. Raises LoraplexError."""
        response = await self._respond(call)
        try:
            return AsyncStream(response, call.parse(response))
        except LoraplexError:
            await response.aclose()
            raise

    async def aclose(self) -> None:
        """Close the pool of connections."""
        if self._owned:
            await self._http.aclose()

    async def _respond(self, call: Call[T]) -> httpx.Response:
        if call.files is None:
            return await self._try_often(call, [])
        with call.files.open() as form_files:
            return await self._try_often(call, form_files)

    async def _try_often(self, call: Call[T], form_files: list[FormFile]) -> httpx.Response:
        retries_taken = 0
        while True:
            answer = await self._try_once(call, form_files)
            if isinstance(answer, httpx.Response):
                return answer
            delay_s = _delay_s(call, answer, retries_taken, self._max_retries)
            if delay_s is None:
                raise answer
            await self._sleep(delay_s)
            retries_taken += 1

    async def _try_once(self, call: Call[T], form_files: list[FormFile]) -> httpx.Response | LoraplexError:
        request = self.endpoint.request(self._http, call, form_files)
        try:
            response = await self._http.send(request, stream=call.stream)
            if call.accepts(response):
                return response
            await response.aread()
        except httpx.RequestError as error:
            return _caused(error_from_httpx(error, self.endpoint.base_url), error)
        return error_from_response(response)


def _delay_s(call: Call[T], failure: LoraplexError, retries_taken: int, max_retries: int) -> float | None:
    allowed = max_retries if call.retry else 0
    return retry_delay_s(failure, retries_taken=retries_taken, max_retries=allowed, jitter=random.random())


def _caused(failure: LoraplexError, cause: Exception) -> LoraplexError:
    # Raised later, outside the except block, where `raise ... from` can no longer record it.
    failure.__cause__ = cause
    return failure
