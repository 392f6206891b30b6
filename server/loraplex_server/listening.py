"""The addresses a server listens on, taken before the base loads: minutes later is too late to hear that a port is taken."""

import errno
import os
import socket


class CannotListen(Exception):
    """An address cannot be had; the message says which, why and what to change."""


def take_addresses(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address of ``host``. Nothing is accepted before someone listens on them.

    Port 0 takes a free one. Raises: CannotListen.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(f"--host {host}: no such address here ({error.strerror})") from error
    sockets: list[socket.socket] = []
    missing = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, kind, protocol, address))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for taken in sockets:
                    taken.close()
                raise CannotListen(_why(host, port, error)) from error
            missing = error
    if not sockets:
        raise CannotListen(_why(host, port, missing or OSError(errno.EADDRNOTAVAIL, ""))) from missing
    return sockets


def _bound(family: int, kind: int, protocol: int, address: object) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)  # type: ignore[arg-type]
    except BaseException:
        bound.close()
        raise
    return bound


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken by another program; choose another --port (0 takes a free one)"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} needs rights that this user lacks; choose a --port above 1023"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port"
