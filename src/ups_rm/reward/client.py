"""A reward model over HTTP: `HttpScorer(url).score(conversations)` answers what `RewardScorer.score` would.

Conversations go to `POST /score` of `ups-rm rm serve`, in blocks, several at a time; scores come back in input order.
What a busy, restarting or unreachable server costs is time and never a sample: 429 and 503 are waited out as the server
asks, lost connections and timeouts are tried again with growing pauses, and a circuit breaker lets one request find out
whether a dead server is back while the others wait. When patience is over, an error says so; no score is ever made up.

Not done here: tokens (the server renders), other servers' protocols.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING

from ups_rm.console import progress_bar
from ups_rm.errors import RMError, RMServerError
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Conversation, Score

if TYPE_CHECKING:
    import httpx

TOKEN_VARIABLE = "UPS_RM_TOKEN"
"""Environment variable with the token of the reward server, read by server and client."""
TRANSIENT = frozenset({408, 429, 502, 503, 504})
"""Answers after which the same request may succeed later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds


class CircuitBreaker:
    """Keeps callers away from a server that failed `failures` times in a row; thread-safe.

    Closed: everybody may call. Open: nobody, for `cooldown` seconds. Then one caller may, the probe: its answer closes
    the breaker, its failure opens it for twice as long (at most `longest`).
    """

    def __init__(self, failures: int = 5, cooldown: float = 1.0, longest: float = 15.0) -> None:
        self.failures = failures
        self.first_cooldown = self.cooldown = cooldown
        self.longest = longest
        self._failed = 0
        self._open_until: float | None = None
        self._probing = False
        self._lock = threading.Lock()

    def delay(self) -> float:
        """Seconds to wait before asking again; 0 means call now, and then report `answered` or `failed`."""
        with self._lock:
            if self._open_until is None:
                return 0.0
            left = self._open_until - monotonic()
            if left > 0:
                return left
            if self._probing:
                return 0.1
            self._probing = True
            return 0.0

    def answered(self) -> None:
        """The server answered, whatever it said."""
        with self._lock:
            self._failed, self._open_until, self._probing = 0, None, False
            self.cooldown = self.first_cooldown

    def failed(self) -> None:
        """No answer, or one that says the server is not well."""
        with self._lock:
            self._failed += 1
            if self._probing:
                self.cooldown = min(2 * self.cooldown, self.longest)
            if self._failed >= self.failures:
                self._open_until = monotonic() + self.cooldown
            self._probing = False


class HttpScorer:
    """Scores conversations on a reward server; may be used by many threads at once.

    Args:
        url: of the server, such as "http://127.0.0.1:8500"; https works too.
        token: sent as bearer token. None: environment variable UPS_RM_TOKEN, if there is one.
        timeout: seconds that one attempt may take from connecting to the last byte of the answer, however the server
            spreads its bytes.
        retries: how often a block is tried again after a lost connection, a timeout or a 408, 502, 503 or 504. A 429 is
            not counted: the server is well, only busy. A 500 is the model's failure and an error at once.
        max_wait: seconds after which a block is given up, whatever it was waiting for; an attempt is cut short by it.
        block: conversations per request. All conversations of one request may share batches, as in the in-process
            scorer; a lost connection repeats at most one request.
        concurrency: requests on their way at once.
        client: an httpx.Client of your own (proxies, certificates): its timeouts hold instead of `timeout`, and it
            stays yours to close.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 600.0,
        retries: int = 20,
        max_wait: float = 1800.0,
        block: int = 256,
        concurrency: int = 4,
        client: httpx.Client | None = None,
    ) -> None:
        try:
            from ups_rm.reward.deadline import deadline_client
        except ImportError as error:
            raise RMServerError("httpx is not installed\n  fix: pip install 'ups-rm[serve]'") from error
        if not url.startswith(("http://", "https://")):
            raise RMServerError(f"{url!r} is not the address of a reward server\n  fix: write http://HOST:PORT")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.max_wait = max_wait
        self.block = block
        self.concurrency = concurrency
        self.breaker = CircuitBreaker()
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._owns_client = client is None
        # no proxies of the environment: conversations go to the server that was named and nowhere else
        self._client = client or deadline_client(max(concurrency, 64))

    def score(self, conversations: Sequence[Conversation], *, progress: bool = False) -> list[Score]:
        """One Score per conversation, in input order.

        Args:
            conversations: messages that end with the reply to score, which may be empty.
            progress: show a progress bar.

        Raises:
            RMError: the server refuses a conversation, or answers what is not a score.
            RMServerError: no answer within `retries` and `max_wait`; wrong token; a request that is too large.
        """
        starts = range(0, len(conversations), self.block)
        blocks = [list(conversations[start : start + self.block]) for start in starts]
        stop = threading.Event()
        scores: list[Score] = []
        with progress_bar("scoring", len(conversations), enabled=progress) as advance:
            if len(blocks) == 1:  # no threads for the common case of a small call
                return self._score_block(blocks[0], stop)
            with ThreadPoolExecutor(max(1, min(self.concurrency, len(blocks)))) as pool:
                futures = [pool.submit(self._score_block, block, stop) for block in blocks]
                try:
                    for future in futures:
                        scores += (found := future.result())
                        advance(len(found))
                except BaseException:
                    stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        return scores

    def close(self) -> None:
        """Close connections; not those of a client that was given."""
        if self._owns_client:
            self._client.close()

    def __enter__(self) -> HttpScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_block(self, conversations: list[Conversation], stop: threading.Event) -> list[Score]:
        """Scores of one request, tried until it is answered or patience is over."""
        body = json.dumps({"conversations": conversations}, ensure_ascii=False).encode("utf-8")
        give_up, failures, pause = monotonic() + self.max_wait, 0, FIRST_PAUSE
        problem = "its circuit breaker is open"
        while not stop.is_set():
            wait = self.breaker.delay()
            if wait == 0.0:
                response, problem = self._attempt(body, min(monotonic() + self.timeout, give_up))
                if response is not None and response.status_code not in TRANSIENT:
                    return self._scores(response, len(conversations))
                failures += response is None or response.status_code != 429
                wait = max(pause * random.uniform(0.5, 1.0), retry_after(response))  # jitter: clients spread out
                pause = min(2 * pause, LONGEST_PAUSE)
            if failures > self.retries or monotonic() + wait > give_up:
                raise RMServerError(
                    f"the reward server at {self.url} did not score {len(conversations)} conversations: {problem} "
                    f"({failures} failed attempts in {self.max_wait - (give_up - monotonic()):.0f} s)\n"
                    "  fix: see that `ups-rm rm serve` runs there; more patience is HttpScorer(retries=, max_wait=)"
                )
            stop.wait(wait)
        raise RMServerError("scoring was stopped because another request of the same call failed")

    def _attempt(self, body: bytes, moment: float) -> tuple[httpx.Response | None, str]:
        """(answer, what is wrong with it) of one POST that ends by `moment`; no answer at all is None. Tells the
        circuit breaker."""
        import httpx

        from ups_rm.reward.deadline import until

        headers = self._headers | {"content-type": "application/json"}
        try:
            with until(moment):
                response = self._client.post(f"{self.url}/score", content=body, headers=headers)
        except httpx.TransportError as error:
            self.breaker.failed()
            return None, f"{type(error).__name__}: {error}"
        except BaseException:
            self.breaker.failed()  # whoever probes must report, even when interrupted
            raise
        if response.status_code >= 500:
            self.breaker.failed()
        else:
            self.breaker.answered()
        return response, f"HTTP {response.status_code}: {_told(response)}"

    def _scores(self, response: httpx.Response, expected: int) -> list[Score]:
        """The answer as Scores.

        Raises:
            RMError: a refusal of the conversations (400, 422), a server-side RMError (500), or an answer that has not
                one finite logit with its safe score for each.
            RMServerError: any other status.
        """
        status = response.status_code
        if status in (400, 422, 500):
            raise RMError(f"{self.url} refuses (HTTP {status}): {_told(response)}")
        if status != 200:
            way_out = {
                401: f"\n  fix: give the server's token: HttpScorer(token=...) or {TOKEN_VARIABLE}",
                413: "\n  fix: HttpScorer(block=...) smaller than now, or a server with a larger --max-body-mb",
            }.get(status, "")
            raise RMServerError(f"{self.url} answers HTTP {status}: {_told(response)}{way_out}")
        try:
            scores = [
                Score(
                    logit=float(row["logit"]),
                    safe_score=float(row["safe_score"]),
                    tokens=int(row["tokens"]),
                    truncated=bool(row["truncated"]),
                    helpfulness=None if row.get("helpfulness") is None else float(row["helpfulness"]),
                )
                for row in response.json()["scores"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise RMError(f"{self.url} answers no list of scores: {type(error).__name__}: {error}") from error
        if len(scores) != expected:
            raise RMError(f"{self.url} answers {len(scores)} scores for {expected} conversations")
        if len({score.helpfulness is None for score in scores}) > 1:
            raise RMError(f"{self.url} answers helpfulness for some conversations and not for others")
        for score in scores:
            if score.helpfulness is not None and not math.isfinite(score.helpfulness):
                raise RMError(f"{self.url} answers helpfulness {score.helpfulness}: not a finite number")
            if not math.isfinite(score.logit) or abs(score.safe_score - safe_score(score.logit)) > 1e-6:
                raise RMError(
                    f"{self.url} answers logit {score.logit} with safe score {score.safe_score}, expected "
                    "safe_score = sigmoid(-logit): that server does not speak of unsafety as ours does"
                )
        return scores


def health(url: str, seconds: float) -> str:
    """What a reward server says of itself, without a token: "HTTP 200", another status, or why nothing came."""
    try:
        import httpx
    except ImportError:
        return "httpx is not installed (pip install 'ups-rm[serve]')"
    try:
        response = httpx.get(f"{url.rstrip('/')}/health", timeout=seconds, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}"
    return f"HTTP {response.status_code}"


def retry_after(response: httpx.Response | None) -> float:
    """Seconds that the server asks to wait, 0 if it does not say; never more than a minute."""
    text = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(text), 60.0) if text.isdigit() else 0.0


def _told(response: httpx.Response) -> str:
    """The server's own words, shortened."""
    try:
        told = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        told = response.text
    return str(told)[:500]
