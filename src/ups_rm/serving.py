"""A uvicorn server on a socket that is listening already, in this thread or in one of its own."""

from __future__ import annotations

import signal
import socket
import threading
from typing import Any, TypeVar

T = TypeVar("T", bound="Served")


class Served:
    """Run until asked to end; as a context manager, in a thread, answering when the body begins.

    Args:
        uvicorn_server: a `uvicorn.Server`. listener: its socket, closed at the end. name: of the thread.
    """

    def __init__(self, uvicorn_server: Any, listener: socket.socket, *, name: str) -> None:
        self._uvicorn, self._socket, self._thread_name = uvicorn_server, listener, name
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT (or `stop`), then answer what was accepted and return."""
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def end_on_signals(self) -> None:
        """SIGTERM and SIGINT ask for the end from now on: also those that arrive before `run` listens to them."""
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: self.stop())  # uvicorn raises them again at its end: asked twice is no harm

    def stop(self) -> None:
        """Ask for the end; `run` returns when everything accepted is answered."""
        self._uvicorn.should_exit = True

    def __enter__(self: T) -> T:
        self._thread = threading.Thread(target=self.run, name=self._thread_name)
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()


def url_of(listener: socket.socket) -> str:
    """Where the socket listens, `http://host:port`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
