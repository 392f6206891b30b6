"""What the engine says about one request, on its way from the bridge to whoever answers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from loraplex_server.engine.messages import TokenOutput

Arrival = TokenOutput | int
"""An output of the engine. Nearly all are one token with nothing else to say: they come as its id alone."""


class TokenStream:
    """The outputs of one request, as they arrive; it ends after the one with a finish reason.

    Read it with ``listen`` and ``take``, or as an async iterator. Leaving it early (``abort``, or the end of an
    ``async with``) gives the request's place back.
    """

    __slots__ = ("_abort", "_arrived", "_ended", "_listener", "_read_to_end", "request_id")

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._arrived: list[Arrival] = []
        self._listener: Callable[[], object] = _nobody
        self._ended = False
        self._read_to_end = False

    def put(self, output: TokenOutput) -> None:
        """An output has arrived."""
        self._ended = self._ended or output.finish_reason is not None
        self.put_token(output)

    def put_token(self, arrival: Arrival) -> None:
        """A token has arrived that does not end the stream."""
        self._arrived.append(arrival)
        self._listener()

    def listen(self, listener: Callable[[], object]) -> None:
        """Have ``listener`` called at every arrival, and now if something is there already."""
        self._listener = listener
        if self._arrived:
            listener()

    def take(self) -> list[Arrival]:
        """All that has arrived since the last time."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self) -> None:
        """Stop the request if it still runs. May be called any number of times."""
        self._read_to_end = True
        if not self._ended:
            self._ended = True
            self._abort(self.request_id)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._read_to_end:
            raise StopAsyncIteration
        while not self._arrived:
            something = asyncio.Event()
            self._listener = something.set
            await something.wait()
        arrival = self._arrived.pop(0)
        output = TokenOutput(self.request_id, (arrival,)) if isinstance(arrival, int) else arrival
        self._read_to_end = output.finish_reason is not None
        return output

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _nobody() -> None:
    return None
