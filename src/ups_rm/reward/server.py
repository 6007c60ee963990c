"""`ups-rm rm serve`: a reward model, one copy per device, behind HTTP.

Three protocols over one queue: ours (`/score`), OpenRLHF's remote RM (`/get_reward`) and vLLM's `/classify`, all of
which read the same logit. Text becomes RM tokens in one thread, tokens become logits in one thread per device
(batch_queue.py); limits and token are in server_guard.py. A request is accepted when it has been read, is well-formed
and has room in the queue; what is accepted is answered, also while the server shuts down.

`RewardServer(...)` for a server in this process (`with` runs it in a thread), `run` until a signal comes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ups_rm.errors import RMError, RMServerError
from ups_rm.reward.batch_queue import BatchQueue, Job, QueueFullError
from ups_rm.reward.client import TOKEN_VARIABLE
from ups_rm.reward.render import Rendered, render, render_text
from ups_rm.reward.scorer import score_of_answer
from ups_rm.reward.server_guard import OPEN_PATHS, Guard, RefusedError, is_loopback, patient_protocol, read_body
from ups_rm.reward.turns import TurnFormat
from ups_rm.serving import Served, url_of
from ups_rm.types import Conversation, Score

try:
    from fastapi import FastAPI, Request, Response
    from pydantic import BaseModel, ValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import PlainTextResponse

    from ups_rm.reward import server_schemas as schemas
    from ups_rm.reward.server_metrics import ServerMetrics
    from ups_rm.reward.server_openapi import REFUSALS, body_of, describe
except ImportError as error:
    raise RMServerError(f"{error.name} is not installed\n  fix: pip install 'ups-rm[serve]'") from error

if TYPE_CHECKING:
    from ups_rm.reward.scorer import Answer, RewardScorer

log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
Reading = tuple[list[Rendered], list[str] | None]
"""Rendered conversations, and the prompt of each, where they came as messages."""


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    max_waiting: conversations accepted and not yet answered; beyond it requests get 429.
    max_body_bytes: of one request; beyond it 413.
    head_seconds, body_seconds: to receive a request's head (else the connection closes) and body (else 408).
    answer_seconds: from an accepted request to its answer; beyond it 503 and what is queued of it is dropped.
    max_connections: beyond it 503.
    """

    max_waiting: int = 4096
    max_body_bytes: int = 16 * 2**20
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    answer_seconds: float = 600.0
    max_connections: int = 1024


class RewardServer(Served):
    """Loaded reward models behind HTTP.

    Args:
        scorers: one RM per device, all of the same folder.
        name: what answers call the model.
        listener: a bound socket (`listen`); None: a free port of this machine, for itself only.
        token: needed by everything but /health; None: by nothing.
        policy_tokenizer: of the policy whose text `/get_reward` gets; None: the RM's own.
        by_request: see BatchQueue.

    Attributes:
        url: where clients find it.
    """

    def __init__(
        self,
        scorers: Sequence[RewardScorer],
        *,
        name: str,
        listener: socket.socket | None = None,
        token: str | None = None,
        limits: Limits | None = None,
        policy_tokenizer: Any = None,
        by_request: bool = False,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.metrics = ServerMetrics()
        self.tokenizer, self.policy, self.heads = scorers[0].tokenizer, scorers[0].policy, scorers[0].heads
        self.turns = TurnFormat.of(policy_tokenizer or self.tokenizer)
        listener = listener or listen("127.0.0.1", 0, None)
        self.url = url_of(listener)
        self.queue = BatchQueue(
            scorers, max_waiting=self.limits.max_waiting, by_request=by_request, on_batch=self.metrics.batch
        )
        self.metrics.watch(self.queue)
        self._render_thread = ThreadPoolExecutor(1, thread_name_prefix="rm-render")
        super().__init__(self._make_uvicorn(token), listener, name="rm-server")

    def _make_uvicorn(self, token: str | None) -> Any:
        import uvicorn

        @asynccontextmanager
        async def lifespan(_: FastAPI):  # type: ignore[no-untyped-def]  # an async generator of nothing
            yield
            # connections are closed by now: nobody waits, or waited longer than answer_seconds
            await asyncio.get_running_loop().run_in_executor(None, self.queue.close)
            self._render_thread.shutdown()

        app = FastAPI(
            title="UPS-RM reward server", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
        )
        add_endpoints(app, self)
        bodies: list[type[BaseModel]] = [schemas.ScoreRequest, schemas.GetRewardRequest, schemas.ClassifyRequest]
        describe(app, bodies, token=token is not None, open_paths=OPEN_PATHS)
        app.add_middleware(Guard, token=token, metrics=self.metrics)
        config = uvicorn.Config(
            app,
            http=patient_protocol(self.limits.head_seconds),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=2048,
            limit_concurrency=self.limits.max_connections,
            timeout_graceful_shutdown=int(self.limits.answer_seconds + self.limits.body_seconds) + 1,
        )
        return uvicorn.Server(config)

    async def read(self, request: Request, model: type[Body]) -> Body:
        """The request's body as `model`.

        Raises:
            RefusedError: 408, 413, 400 for what is not JSON, 422 for what is not the model.
        """
        body = await read_body(request, max_bytes=self.limits.max_body_bytes, seconds=self.limits.body_seconds)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from None

    async def score(self, request: Request, conversations: int, read: Callable[[], Reading]) -> list[Score]:
        """Scores of a request's conversations, which `read` renders.

        Raises:
            RefusedError: 413 for more than could ever be accepted, 429 for more than fits now, 422 for what can't be
                rendered, 503 when the answer took too long, 500 when the model failed.
        """
        if conversations > self.limits.max_waiting:
            raise RefusedError(413, f"{conversations} conversations in one request, at most {self.limits.max_waiting}")
        try:
            self.queue.reserve(conversations)
        except QueueFullError as error:
            raise RefusedError(429, str(error), retry_after=error.retry_after) from None
        try:
            loop = asyncio.get_running_loop()
            until = monotonic() + self.limits.answer_seconds
            job = await loop.run_in_executor(self._render_thread, lambda: self.queue.submit(*read()))
            answers = await self._answers(request, job, until - monotonic())
        except RMError as error:
            raise RefusedError(422, str(error)) from None
        finally:
            self.queue.release(conversations)
        self.metrics.conversations.inc(len(answers))
        self.metrics.truncated.inc(sum(row.truncated for row in job.rendered))
        return [score_of_answer(self.heads, answer, row) for row, answer in zip(job.rendered, answers, strict=True)]

    def conversations(self, conversations: Sequence[Conversation]) -> Reading:
        """Rendered, and what says which of them share a prompt."""
        prompts = [str(conversation[:-1]) for conversation in conversations]
        return render(self.tokenizer, conversations, self.policy), prompts

    async def _answers(self, request: Request, job: Job, seconds: float) -> list[Answer]:
        answered = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waited: set[asyncio.Future[Any]] = {answered, gone}
            await asyncio.wait(waited, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
            if not job.future.done():
                if gone.done():
                    raise RefusedError(499, "the client has gone")
                raise RefusedError(503, f"no answer within {self.limits.answer_seconds:g} s", retry_after=5)
            return await answered
        except RMError as error:
            raise RefusedError(500, str(error)) from None
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(500, f"the model failed: {type(error).__name__}") from error
        finally:
            gone.cancel()
            self.queue.abandon(job)  # does nothing to a job that is done
            answered.add_done_callback(lambda future: future.cancelled() or future.exception())


def add_endpoints(app: FastAPI, server: RewardServer) -> None:
    """The five endpoints and the form of their errors: {"error": text}."""

    def post(
        path: str, model: type[BaseModel], response: type[BaseModel]
    ) -> Callable[[Callable[[Request], Awaitable[Any]]], Any]:
        answers = {200: {"model": response}, **REFUSALS}
        return app.post(path, responses=answers, openapi_extra=body_of(model), response_model=None)

    @post("/score", schemas.ScoreRequest, schemas.ScoreResponse)
    async def score(request: Request) -> Response:
        """Conversations in; logit (higher = less safe), safe_score = sigmoid(-logit), helpfulness (null without such a
        head), tokens and truncated out."""
        body = await server.read(request, schemas.ScoreRequest)
        conversations = [schemas.conversation(messages) for messages in body.conversations]
        scores = await server.score(request, len(conversations), lambda: server.conversations(conversations))
        return _json({"model": server.name, "scores": [vars(one) for one in scores]})

    @post("/get_reward", schemas.GetRewardRequest, schemas.GetRewardResponse)
    async def get_reward(request: Request) -> Response:
        """OpenRLHF's remote RM: text of the policy in; rewards = scores = safe score, higher = safer, out."""
        body = await server.read(request, schemas.GetRewardRequest)
        prompts: Sequence[str | None] = body.prompts if body.prompts is not None else [None] * len(body.query)

        def read() -> Reading:
            pairs = zip(body.query, prompts, strict=True)
            return server.conversations([server.turns.conversation(query, prompt) for query, prompt in pairs])

        scores = await server.score(request, len(body.query), read)
        rewards = [one.safe_score for one in scores]
        logs = {"rm_logit": [one.logit for one in scores], "rm_truncated": [float(one.truncated) for one in scores]}
        if "helpfulness" in server.heads:
            logs["rm_helpfulness"] = [one.helpfulness for one in scores if one.helpfulness is not None]
        return _json({"rewards": rewards, "scores": rewards, "extra_logs": logs})

    @post("/classify", schemas.ClassifyRequest, schemas.ClassifyResponse)
    async def classify(request: Request) -> Response:
        """vLLM's classify: text in the RM's template or messages in; one number each, higher = safer, out."""
        body = await server.read(request, schemas.ClassifyRequest)
        if body.messages is not None:
            conversations = [schemas.conversation(body.messages)]
            scores = await server.score(request, 1, lambda: server.conversations(conversations))
        else:
            texts = [body.input] if isinstance(body.input, str) else body.input or []
            scores = await server.score(
                request, len(texts), lambda: (render_text(server.tokenizer, texts, server.policy), None)
            )
        numbers = [-one.logit if body.use_activation is False else one.safe_score for one in scores]
        tokens = sum(one.tokens for one in scores)
        answer = schemas.ClassifyResponse(
            model=server.name,
            data=[schemas.ClassifyRow(index=i, probs=[number]) for i, number in enumerate(numbers)],
            usage=schemas.Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
        if body.request_id:
            answer.id = f"classify-{body.request_id}"
        return _json(answer.model_dump())

    @app.get("/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
    async def health() -> Response:
        """200 while every model can answer."""
        alive = server.queue.alive()
        return _json({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
        if error.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        return _json({"error": error.message}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_ours(_: Request, error: HTTPException) -> Response:
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _refusal(error: ValidationError) -> RefusedError:
    """The first three mistakes, by place and kind; never what was sent."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [".".join(map(str, one["loc"])) + (": " if one["loc"] else "") + one["msg"] for one in found[:3]]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return RefusedError(400 if found[0]["type"] == "json_invalid" else 422, "; ".join(lines) + more)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A bound socket that does not listen yet: what is wrong with the address is told before models are loaded.

    Raises:
        RMServerError: no token although other machines can connect; an address that can't be used.
    """
    if token is None and not is_loopback(host):
        raise RMServerError(
            f"--host {host} can be reached from other machines, and there is no token\n"
            f"  fix: set the environment variable {TOKEN_VARIABLE} or give --token-file, or listen on 127.0.0.1"
        )
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise RMServerError(f"{host}:{port} can't be listened on: {error.strerror}") from error
    return bound
