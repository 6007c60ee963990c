"""`ups-rm watch`: the report of a run that goes on, served to this machine and kept up to date.

GET / is the page, GET /data what its script asks for every two seconds: 304 while nothing is new, else all of it. The
run folder is only read. One page is made at a time, and no more often than a tenth of the time allows; whoever asks
meanwhile gets the last one. Listening on more than loopback needs a token; on loopback the Host header must name it, so
that no page of another site can read the replies through the reader's browser.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from ups_rm.errors import RMServerError, RunError
from ups_rm.report.page import frame, pack_runs
from ups_rm.report.run import read_run
from ups_rm.reward.server_guard import Guard, patient_protocol
from ups_rm.serving import Served, url_of

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise RMServerError(f"{error.name} is not installed\n  fix: pip install 'ups-rm[serve]'") from error

LIVE_GROUP_BYTES = 2 * 2**20
"""Of the group log in a live page: less than in the file, so that it is made in a second."""
SHARE_OF_TIME = 0.1
"""What making pages may take of one core."""
MOST_CONNECTIONS = 64


@dataclass(frozen=True)
class Made:
    """One state of the runs: the folders' fingerprint, the packed data, its tag and when it may be made again."""

    fingerprint: tuple[Any, ...]
    data: bytes
    tag: str
    not_before: float


class Watched:
    """The runs' data, made anew when their folders change. For threads."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self.runs = [Path(run) for run in runs]
        self._lock = threading.Lock()
        self._made = self._make()

    def latest(self) -> Made:
        """The newest data; what was made before while somebody else makes it, or while it is too early to."""
        if monotonic() >= self._made.not_before and self._lock.acquire(blocking=False):
            try:
                if _fingerprint(self.runs) != self._made.fingerprint:
                    self._made = self._make()
            finally:
                self._lock.release()
        return self._made

    def page(self) -> str:
        """The page with the newest data in it."""
        title = ", ".join(run.resolve().name for run in self.runs)
        return frame(self.latest().data, title=title, live=True)

    def _make(self) -> Made:
        started, fingerprint = monotonic(), _fingerprint(self.runs)
        each = LIVE_GROUP_BYTES // len(self.runs)
        data = pack_runs([read_run(run, group_bytes=each) for run in self.runs], live=True)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        return Made(fingerprint, data, tag, monotonic() + (monotonic() - started) / SHARE_OF_TIME)


def _fingerprint(runs: Sequence[Path]) -> tuple[Any, ...]:
    """Sizes and times of what a page is made from; a log of groups counts by its newest file."""
    names = ("metrics.jsonl", "recipe.yaml", "alarms.jsonl", "summary.json", "eval/pairs.jsonl", "policy", "groups")
    found: list[Any] = []
    for run in runs:
        for name in names:
            try:
                stat = (run / name).stat()
                found.append((stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(None)
    return tuple(found)


class WatchServer(Served):
    """The page of these runs behind HTTP.

    Args:
        runs: run folders, of which the first need not have begun its training.
        listener: a bound socket (`reward.server.listen`).
        token: needed by every request; None: by none, and then only loopback names are answered to.

    Raises:
        RunError: a folder is not a run's.
    """

    def __init__(self, runs: Sequence[Path], *, listener: socket.socket, token: str | None) -> None:
        self.watched = Watched(runs)
        self.url = f"{url_of(listener)}/"
        app = Starlette(routes=[Route("/", self._page), Route("/data", self._data)])
        if token is None:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
        app.add_middleware(Guard, token=token, challenge=b'Basic realm="ups-rm", charset="UTF-8"')
        served = uvicorn.Server(
            uvicorn.Config(
                app, http=patient_protocol(10.0), ws="none", log_level="warning", access_log=False,
                server_header=False, limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        super().__init__(served, listener, name="watch")

    async def _page(self, _: Request) -> Response:
        try:
            html = await asyncio.to_thread(self.watched.page)
        except (RunError, OSError) as error:  # the folder went away
            return Response(f"{error}\n", 503, _HEADERS, "text/plain")
        return Response(html, 200, _HEADERS, "text/html")

    async def _data(self, request: Request) -> Response:
        try:
            made = await asyncio.to_thread(self.watched.latest)
        except (RunError, OSError) as error:
            return Response(f"{error}\n", 503, _HEADERS, "text/plain")
        headers = {**_HEADERS, "etag": made.tag}
        if request.headers.get("if-none-match") == made.tag:
            return Response(None, 304, headers)
        return Response(made.data, 200, headers, "text/plain")


_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
