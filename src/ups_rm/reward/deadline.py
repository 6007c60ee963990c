"""HTTP with a time limit for a whole exchange: `deadline_client()` gives an httpx.Client, `until(t)` sets the limit.

httpx limits each read and write, so a server that sends a byte now and then holds a request for ever. Here every read
and write of a thread gets what is left until the moment that `until` was given in that thread; httpx raises its own
timeouts. Connections are shared by threads, the limit is not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import httpcore
import httpx

_WRITTEN_AT_ONCE = 65536
_limit = threading.local()


@contextmanager
def until(moment: float) -> Iterator[None]:
    """This thread's exchanges through a `deadline_client` end by `moment`, a time of `monotonic()`."""
    _limit.moment = moment
    try:
        yield
    finally:
        _limit.moment = None


def deadline_client(max_connections: int) -> httpx.Client:
    """A client that obeys `until`, has no other limit, and takes no proxies from the environment."""
    transport = httpx.HTTPTransport(limits=httpx.Limits(max_connections=max_connections), trust_env=False)
    # httpcore's pool takes a network backend, httpx has no argument to hand it on (0.28)
    transport._pool._network_backend = _Backend()
    return httpx.Client(transport=transport, timeout=None, trust_env=False)


def _left(timeout: float | None, error: type[Exception]) -> float | None:
    """Seconds that an operation may take: its own limit, or what is left until the thread's moment.

    Raises:
        error: nothing is left.
    """
    moment = getattr(_limit, "moment", None)
    if moment is None:
        return timeout
    left = moment - monotonic()
    if left <= 0:
        raise error("the whole exchange took too long")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore.NetworkStream):
    """A connection whose every read and write ends in time."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITTEN_AT_ONCE):
            part = buffer[start : start + _WRITTEN_AT_ONCE]
            self._stream.write(part, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """httpcore's own sockets, wrapped."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> _Stream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._backend.connect_tcp(host, port, left, local_address, socket_options))
