"""The reward server under bad requests: bodies and heads straight into the application, raw bytes over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import select
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz import mutate
from tiny import llama3_tokenizer
from ups_rm.reward.render import RenderPolicy
from ups_rm.reward.server import Limits, RewardServer
from ups_rm.reward.shared_prompt import Row

TALK = [{"role": "user", "content": "Hi <|eot_id|>"}, {"role": "assistant", "content": "Hello!"}]
TEXT = llama3_tokenizer().apply_chat_template(TALK, tokenize=False)
GOOD: dict[str, list[Any]] = {
    "/score": [{"conversations": [TALK, TALK]}, {"conversations": []}],
    "/get_reward": [{"query": [TEXT], "prompts": None}, {"query": [TEXT, TEXT], "prompts": [TEXT[:60], TEXT[:60]]}],
    "/classify": [{"input": [TEXT]}, {"messages": TALK, "use_activation": False}, {"input": TEXT, "request_id": "a"}],
}
PATHS = (
    *(*GOOD, "/health", "/metrics", "/openapi.json"),
    *("/", "//score", "/score/", "/%00", "/../score", "/\u202e", "/score?x=%ff"),
)
METHODS = ("POST", "POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "NONSENSE")
HEADS = ("content-length", "x", "authorization", "expect", "content-encoding", "transfer-encoding")
VALUES = ("-1", "99999999999", "9" * 5000, "²", "\xff", "Basic ÿ", "gzip", "chunked", "100-continue", "")
ANSWERS = {200, 400, 401, 404, 405, 408, 413, 422, 429}
LIMITS = Limits(max_waiting=64, max_body_bytes=50_000, head_seconds=5.0, body_seconds=0.3, answer_seconds=20.0)


class Server:
    """A server with a model whose logit is the number of tokens that it reads."""

    def __init__(self, folder: Path) -> None:
        logging.disable(logging.ERROR)  # of refused requests
        tokenizer = llama3_tokenizer()
        policy = RenderPolicy.infer(tokenizer, max_length=500)
        model: Any = SimpleNamespace(
            tokenizer=tokenizer,
            policy=policy,
            heads=("unsafety",),
            device="cpu",
            max_batch_tokens=4096,
            enough_tokens=4096,
            rows_of=lambda ids, prompts: [Row((i,), 0, len(one)) for i, one in enumerate(ids)],
            row_answers=lambda rows, ids: [(len(one) / 100,) for one in ids],
            laid_out=nullcontext,
        )
        self.server = RewardServer([model], name="fuzzed", limits=LIMITS)
        self.server.__enter__()
        self.app: Any = self.server._uvicorn.config.app
        self.loop = asyncio.new_event_loop()
        self.last: Any = b""
        self.count = 0

    def shown(self) -> str:
        return repr(self.last)[:2000]

    def close(self) -> None:
        self.loop.close()
        self.server.__exit__()
        logging.disable(logging.NOTSET)

    def case(self, draw: random.Random) -> str:
        path = draw.choice(list(GOOD)) if draw.random() < 0.9 else draw.choice(PATHS)
        good = draw.choice(GOOD.get(path, [{}]))
        body = json.dumps(mutate.mutated(draw, good) if draw.random() < 0.85 else good).encode()
        if draw.random() < 0.3:
            body = mutate.damaged(draw, body, [json.dumps(one).encode() for ones in GOOD.values() for one in ones])
        if draw.random() < 0.005:
            body = b'{"conversations": ["' + b"x" * 60_000
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        if draw.random() < 0.1:
            headers[draw.randrange(2)] = (draw.choice(HEADS), draw.choice(VALUES))
        method = draw.choice(METHODS) if draw.random() < 0.1 else "POST"
        self.count += 1
        if draw.random() < 0.05:
            status, answer = self._by_socket(draw, method, path, headers, body)
        else:
            self.last = (method, path, headers, body)
            status, answer = self.loop.run_until_complete(self._straight(draw, method, path, headers, body))
        self._holds(status, answer, path, method)
        if self.count % 500 == 0:
            self._honest()
        return str(status) if status else "closed"

    async def _straight(
        self, draw: random.Random, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, bytes]:
        """The application as an ASGI server calls it, the body in pieces."""
        place, _, query = path.partition("?")
        raw = [(name.encode("latin-1", "replace"), text.encode("latin-1", "replace")) for name, text in headers]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": place,
            "raw_path": place.encode(),
            "query_string": query.encode(),
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("rm", 80),
        }
        cut = draw.randrange(len(body) + 1)
        parts = [body[:cut], body[cut:]]
        sent: list[dict[str, Any]] = []
        messages = [{"type": "http.request", "body": part, "more_body": part is parts[0]} for part in parts]
        if draw.random() < 0.01:
            messages = [messages[0], {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(3600)  # until somebody disconnects
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        from starlette.requests import ClientDisconnect

        try:
            await asyncio.wait_for(self.app(scope, receive, send), 20)
        except ClientDisconnect:
            return 0, b""
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1
        return int(starts[0]["status"]), b"".join(message.get("body", b"") for message in sent)

    def _by_socket(
        self, draw: random.Random, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, bytes]:
        """As bytes on a connection, damaged, closed by the client after them."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "host: rm",
            "connection: close",
            *(f"{name}: {text}" for name, text in headers),
        ]
        data = "\r\n".join([*lines, "", ""]).encode("utf-8") + body
        data = mutate.damaged(draw, data) if draw.random() < 0.7 else data
        self.last = data
        return self._exchange(data)

    def _exchange(self, data: bytes, wait: float = 0.03) -> tuple[int, bytes]:
        host, _, port = self.server.url.removeprefix("http://").rpartition(":")
        came = b""
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            try:
                connection.sendall(data)
                if not select.select([connection], [], [], wait)[0]:
                    connection.shutdown(socket.SHUT_WR)  # it waits for more, which does not come
                while piece := connection.recv(65536):
                    came += piece
            except ConnectionError:
                pass
        if not came:
            return 0, b""
        came = came.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not came:
            return 0, b""
        assert came.startswith(b"HTTP/1.1 "), came[:200]
        status, _, answer = int(came[9:12]), *came.partition(b"\r\n\r\n")[1:]
        return status, answer

    def _holds(self, status: int, answer: bytes, path: str, method: str) -> None:
        assert status in ANSWERS or status == 0, f"{status}: {answer[:500]!r}"
        assert len(answer) < 200_000
        assert b"Traceback" not in answer
        if status != 200 or path not in GOOD or method != "POST" or not answer.startswith(b"{"):
            return
        told = json.loads(answer)
        for one in told.get("scores", []):
            if isinstance(one, dict):
                assert math.isfinite(one["logit"])
                assert math.isclose(one["safe_score"], 1 / (1 + math.exp(one["logit"])))
            else:
                assert 0 <= one <= 1

    def _honest(self) -> None:
        """A right request is answered rightly, and nothing waits."""
        body = json.dumps({"conversations": [TALK]}).encode()
        head = f"POST /score HTTP/1.1\r\nhost: rm\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        status, answer = self._exchange(head.encode() + body, wait=20.0)
        assert status == 200, answer
        one = json.loads(answer)["scores"][0]
        assert one["logit"] == one["tokens"] / 100
        assert self.server.queue.waiting == 0
