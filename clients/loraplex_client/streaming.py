"""Streamed answers: iterators over chunks that own their connection."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import httpx

from .errors import APIConnectionError, ResponseFormatError, error_from_event, error_from_httpx
from .sse import EventDecoder
from .types import Served

_DONE = "[DONE]"


class Chunk(Protocol):
    """What the streams need of a chunk: its part of the first choice's text."""

    @property
    def text(self) -> str: ...


C = TypeVar("C", bound=Chunk)


class ChunkReader(Generic[C]):
    """Bytes of a stream in, chunks out; shared by both streams, does no I/O.

    `done` turns True at the server's `[DONE]`; `texts` collects the first choice's text.
    """

    def __init__(self, headers: httpx.Headers, read_chunk: Callable[[str], C]) -> None:
        self._headers = headers
        self._read_chunk = read_chunk
        self._events = EventDecoder()
        self.texts: list[str] = []
        self.done = False
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "text/event-stream":
            raise ResponseFormatError("the server did not answer with an event stream")

    def feed(self, data: bytes) -> Iterator[C]:
        """Yield the chunks that `data` completes; bytes after the end are ignored.

        Raises APIError: the server reported an error in the stream. ResponseFormatError: an event is not a chunk.
        """
        if self.done:
            return
        for event in self._events.feed(data):
            if event.data == _DONE:
                self.done = True
                return
            self._raise_if_error(event.data)
            chunk = self._read_chunk(event.data)
            self.texts.append(chunk.text)
            yield chunk

    def finish(self) -> None:
        """Raise APIConnectionError if the stream ended before the server said that it was complete."""
        if not self.done:
            raise APIConnectionError("the connection closed before the answer was complete", transient=False)

    def _raise_if_error(self, data: str) -> None:
        # Chunks rarely contain the word, so most are parsed once.
        if '"error"' not in data:
            return
        try:
            event = json.loads(data)
        except ValueError:
            return
        if isinstance(event, dict) and event.get("error") is not None:
            raise error_from_event(event["error"], self._headers)


class _StreamBase(Generic[C]):
    def __init__(self, response: httpx.Response, read_chunk: Callable[[str], C]) -> None:
        self._response = response
        self._reader = ChunkReader(response.headers, read_chunk)
        self.served = Served.from_headers(response.headers)

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return "".join(self._reader.texts)

    def _broken(self, error: httpx.RequestError) -> APIConnectionError:
        return error_from_httpx(error, str(self._response.url))


class Stream(_StreamBase[C]):
    """Chunks as they arrive. Leaving the `with` block closes the connection, and the server stops generating.

    Iteration raises APIError for an error that the server reports in the stream, and APIConnectionError if it breaks.
    """

    def __init__(self, response: httpx.Response, read_chunk: Callable[[str], C]) -> None:
        super().__init__(response, read_chunk)
        self._chunks = self._iterate()

    def __iter__(self) -> Iterator[C]:
        return self._chunks

    def __next__(self) -> C:
        return next(self._chunks)

    def __enter__(self) -> Stream[C]:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._chunks.close()
        self._response.close()

    def _iterate(self) -> Generator[C, None, None]:
        try:
            # Read on to the end of the body after [DONE]: only then can the connection serve the next request.
            for data in self._response.iter_bytes():
                yield from self._reader.feed(data)
            self._reader.finish()
        except httpx.RequestError as error:
            raise self._broken(error) from error
        finally:
            self._response.close()


class AsyncStream(_StreamBase[C]):
    """`Stream` for `async for` and `async with`."""

    def __init__(self, response: httpx.Response, read_chunk: Callable[[str], C]) -> None:
        super().__init__(response, read_chunk)
        self._chunks = self._iterate()

    def __aiter__(self) -> AsyncIterator[C]:
        return self._chunks

    async def __anext__(self) -> C:
        return await anext(self._chunks)

    async def __aenter__(self) -> AsyncStream[C]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; may be called twice."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def _iterate(self) -> AsyncGenerator[C, None]:
        try:
            async for data in self._response.aiter_bytes():
                for chunk in self._reader.feed(data):
                    yield chunk
            self._reader.finish()
        except httpx.RequestError as error:
            raise self._broken(error) from error
        finally:
            await self._response.aclose()
