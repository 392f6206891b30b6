"""uvicorn's protocol over httptools, with a bound that httptools does not have: on a request's line and headers."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraplex_server.web import MAX_HEAD_BYTES


class BoundedHead(HttpToolsProtocol):
    """Answers 400 to a head that goes on for more than ``MAX_HEAD_BYTES`` after the chunk that it began in.

    A chunk is what one read of the socket brings, 256 KiB at most, so that memory is bounded either way.
    """

    _is_in_head = False
    _num_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if was_in_head and self._is_in_head and not self.transport.is_closing():
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The request's headers have more than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()
