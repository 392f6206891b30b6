import socket

import pytest

from loraplex_server.listening import CannotListen, take_addresses


def close(sockets: list[socket.socket]) -> None:
    for bound in sockets:
        bound.close()


def test_a_free_port_is_taken_without_answering_yet():
    sockets = take_addresses("127.0.0.1", 0)
    try:
        port = sockets[0].getsockname()[1]
        assert port > 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    finally:
        close(sockets)


def test_a_taken_port_is_named_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match=rf"port {port} of 127\.0\.0\.1 is taken .* --port"):
            take_addresses("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(CannotListen, match="--host"):
        take_addresses(host, 0)
