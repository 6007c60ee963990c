"""What stands between the network and the endpoints of the reward server: token, size and time limits, metrics.

`Guard` is ASGI middleware (token, counting), `read_body` reads a body within its limits, `patient_protocol` is
uvicorn's HTTP/1.1 protocol with a limit on the time that a client may take to send its headers; uvicorn has none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RMServerError

if TYPE_CHECKING:
    from starlette.requests import Request

    from ups_rm.reward.server_metrics import ServerMetrics

OPEN_PATHS = frozenset({"/health"})
"""Answered without a token: says that the server lives and nothing else."""


class RefusedError(Exception):
    """A request that is answered with an error status; `message` is for the client."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can connect to `host`: every address it stands for is a loopback one."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise RMServerError(f"--host {host}: {error}") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


def read_token(file: Path | None, variable: str | None) -> str | None:
    """The token: from `file` if there is one, else the environment's value, else none.

    Raises:
        RMServerError: the file can't be read or others may read it; a token under 16 characters or with blanks.
    """
    if file is None:
        token = variable or None
    else:
        try:
            if file.stat().st_mode & 0o077:
                raise RMServerError(f"{file} can be read by other users\n  fix: chmod 600 {file}")
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RMServerError(f"token file {file} can't be read: {error}") from error
    if token is not None and (len(token) < 16 or not token.isascii() or any(c.isspace() for c in token)):
        raise RMServerError(
            f"the token has {len(token)} characters; expected at least 16, ASCII, no blanks\n"
            "  fix: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


class Guard:
    """ASGI middleware: who has not the token gets 401 before the body is read; every answer is counted in `metrics`.

    `challenge` asks for the token: a browser shows its own dialogue for `Basic`.
    """

    def __init__(
        self, app: Any, *, token: str | None, metrics: ServerMetrics | None = None, challenge: bytes = b"Bearer"
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.challenge = challenge
        self._digest = _digest(token) if token is not None else None

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS or self._knows_token(scope["headers"]):
                await self.app(scope, receive, counted)
            else:
                await _unauthorized(counted, self.challenge)
        finally:
            if self.metrics is not None:
                self.metrics.answered(scope["path"], status, perf_counter() - started)

    def _knows_token(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._digest is None:
            return True
        given = [_token_of(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
        # digests have one length, so the comparison takes the same time whatever was sent
        return any(hmac.compare_digest(_digest(token), self._digest) for token in given)


def _token_of(name: bytes, value: bytes) -> str:
    """The token in a header: X-Api-Key, `Bearer TOKEN`, or the password of `Basic`, which http://:TOKEN@host sends."""
    text = value.decode("latin-1").strip()
    if name == b"x-api-key":
        return text
    scheme, _, rest = text.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode("latin-1").partition(":")[2]
        except binascii.Error:
            return ""
    return ""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8")).digest()


async def _unauthorized(send: Callable[[Any], Awaitable[None]], challenge: bytes) -> None:
    body = json.dumps({"error": "a token is needed: Authorization: Bearer TOKEN"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", challenge),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: 413 as soon as it is known to be larger than `max_bytes`, 408 if it is not there after `seconds`.
    """
    import anyio

    too_large = RefusedError(413, f"the body is larger than {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the body was not there after {seconds:g} s, only {len(body)} bytes of it") from None
    return bytes(body)


def patient_protocol(seconds: float) -> Any:
    """uvicorn's HTTP/1.1 protocol class that closes a connection which has sent no whole head after `seconds`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        """Counts from the first byte that could belong to a request (from the connection on, for the first one)."""

        _head_timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(seconds, self._too_slow)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._head_timer = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return PatientProtocol
