"""The reward model as Ray actors: one per device, any number, shared by all of verl's reward-loop workers.

An actor is found by its name in the job's Ray namespace, so whoever asks first creates it and everybody uses it. Each
holds the scorer that every other part of the project uses. `RMPool` is one process' way to them: it hands batches to
idle workers, limits every call in time, tries a failed batch on another worker, and brings back a worker that died or
hangs. What it can't repair is an `RMError`.

Where the workers run is `reward_model.placement`; the trade-offs are in docs/guides/verl-rewards.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ups_rm.distributed.rewards import check_folder
from ups_rm.errors import RMError, UpsRmError
from ups_rm.types import Conversation, Score, Scorer

if TYPE_CHECKING:
    from ups_rm.recipe import RewardModel

WORKER_NAME = "ups_rm_worker_{index}"
PING_PAUSE_S = 0.2
"""Between two looks at a worker that Ray is restarting."""
CLOCK_S = 5.0
"""Within which workers must say how long they scored; one that is loading is not waited for."""


@dataclass(frozen=True)
class PoolSettings:
    """What a worker needs to know: the recipe's `reward_model`, and where training runs.

    `device` is "cpu" or "cuda"; `train_gpus` and `gpus_per_node` are the GPUs that verl trains on.
    """

    reward_model: RewardModel
    device: str = "cpu"
    train_gpus: int = 0
    gpus_per_node: int = 1

    @classmethod
    def from_verl(cls, config: Any) -> PoolSettings:
        """From verl's resolved configuration, in which `verl_overrides` put the recipe's section.

        Raises:
            RMError: `reward.ups_rm` is missing or has unknown keys.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from ups_rm.recipe import RewardModel

        section = config.reward.get("ups_rm")
        if section is None:
            raise RMError(
                "verl's configuration has no reward.ups_rm\n  fix: start it with `ups-rm train --engine verl`"
            )
        try:
            merged = OmegaConf.merge(OmegaConf.structured(RewardModel), OmegaConf.to_container(section, resolve=True))
        except OmegaConfBaseException as error:
            raise RMError(f"reward.ups_rm.{error.full_key}: {str(error).splitlines()[0]}") from error
        reward_model = OmegaConf.to_object(merged)
        assert isinstance(reward_model, RewardModel)
        per_node = int(config.trainer.n_gpus_per_node)
        return cls(reward_model, str(config.trainer.device), per_node * int(config.trainer.nnodes), max(1, per_node))

    @property
    def loads_beside_verl(self) -> bool:
        """Whether the workers may load while verl starts. On GPUs that are shared vLLM then measures free memory, and
        those of the RM's `own` are what verl leaves when it has placed its workers node by node."""
        return self.device != "cuda" or self.reward_model.placement in ("node", "http")


class RMWorker:
    """The Ray actor. The reward model is loaded by the first call, so that an error is that call's own exception."""

    def __init__(self, settings: PoolSettings, index: int) -> None:
        self.settings, self.index = settings, index
        self._scorer: Scorer | None = None
        self._seconds = 0.0

    def check(self) -> None:
        """See `check_folder`, on the worker's node.

        Raises:
            RMError: a folder of the recipe is not there, or is no reward model.
        """
        for entry in self.settings.reward_model.asked():
            if entry.path:
                check_folder(entry)

    def load(self) -> str:
        """Load the reward model unless it is there; returns what and where, for the log.

        Raises:
            RMError: the folder can't be loaded, or does not match its card.
        """
        if self._scorer is None:
            self._scorer = open_worker_scorer(self.settings, self.index)
        entries = self.settings.reward_model.asked()
        named = ", ".join(entry.path or entry.url or entry.callable for entry in entries)
        return f"RM worker {self.index}: {named} (process {os.getpid()})"

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """One Score per conversation, in input order.

        Raises:
            RMError: see `RewardScorer.score`.
        """
        if self._scorer is None:
            self._scorer = open_worker_scorer(self.settings, self.index)
        started = perf_counter()
        scores = self._scorer.score(list(conversations))
        self._seconds += perf_counter() - started
        return scores

    def take_seconds(self) -> float:
        """Seconds of scoring since the last call of this method."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def open_worker_scorer(settings: PoolSettings, index: int) -> Scorer:
    """The scorer of worker `index`, on the device that its placement gives it."""
    reward_model = settings.reward_model
    if reward_model.placement == "shared" and settings.device == "cuda":
        # Ray hides all GPUs from an actor that asks for none; CUDA reads this when it is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % settings.gpus_per_node)
    from ups_rm.reward.open import open_scorer

    return open_scorer(reward_model, settings.device)


def worker_options(settings: PoolSettings, index: int) -> dict[str, Any]:
    """Ray's options for worker `index`.

    No CPU is asked for: a worker must never wait for one that verl holds. Ray restarts a worker whose process died.
    """
    options: dict[str, Any] = {
        "name": WORKER_NAME.format(index=index),
        "get_if_exists": True,
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": -1,
    }
    placement, on_gpu = settings.reward_model.placement, settings.device == "cuda"
    if placement == "own" and on_gpu:
        options["num_gpus"] = 1
    elif placement == "node":
        options["resources"] = {settings.reward_model.node_resource: 1}
        options["num_gpus"] = 1 if on_gpu else 0
    elif placement == "shared" and on_gpu:
        options["scheduling_strategy"] = _node_of(index // settings.gpus_per_node)
    return options


def _node_of(number: int) -> Any:
    """Pins an actor to the `number`-th node that has GPUs, in the order of their addresses."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = sorted(
        (node["NodeManagerAddress"], node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    )
    return NodeAffinitySchedulingStrategy(node_id=nodes[number % len(nodes)][1], soft=False)


def check_capacity(settings: PoolSettings, resources: Mapping[str, float]) -> None:
    """Whether the cluster can ever give the workers what their placement asks for.

    Args:
        resources: `ray.cluster_resources()`.

    Raises:
        RMError: too few GPUs, or too few of the custom resource: Ray would let the workers wait forever.
    """
    reward_model = settings.reward_model
    workers, placement = reward_model.num_workers, reward_model.placement
    gpus = int(resources.get("GPU", 0))
    if settings.device == "cuda":
        if placement in ("own", "node") and gpus < settings.train_gpus + workers:
            raise RMError(
                f"reward_model.placement={placement} needs {workers} GPUs beside the {settings.train_gpus} of the "
                f"training, the cluster has {gpus}\n"
                "  fix: lower trainer.n_gpus_per_node or reward_model.num_workers, or reward_model.placement=shared"
            )
        if placement == "shared" and workers > settings.train_gpus:
            raise RMError(
                f"reward_model.num_workers={workers}, but there are only {settings.train_gpus} training GPUs to share\n"
                f"  fix: reward_model.num_workers={settings.train_gpus}"
            )
    name, there = reward_model.node_resource, resources.get(reward_model.node_resource, 0)
    if placement == "node" and there < workers:
        raise RMError(
            f"reward_model.placement=node: the cluster has {there:g} of the Ray resource {name!r}, "
            f"{workers} workers need one each\n"
            f"  fix: on the RM node: ray start --address=HEAD:6379 --resources='{{\"{name}\": {workers}}}'"
        )


@dataclass(frozen=True)
class _Worker:
    index: int
    actor: Any


class RMPool:
    """One process' access to the workers; created inside a running Ray job.

    Keep it as long as anyone scores: Ray ends an actor when the process that created it lets go of its handle.
    `score` may be called any number of times at once: calls beyond the number of workers wait for an idle one.
    """

    def __init__(self, settings: PoolSettings) -> None:
        import ray

        self.settings = settings
        self.timeout_s = settings.reward_model.timeout_s
        check_capacity(settings, ray.cluster_resources())
        actor_class = ray.remote(RMWorker)
        self.workers = [
            _Worker(i, actor_class.options(**worker_options(settings, i)).remote(settings, i))
            for i in range(settings.reward_model.num_workers)
        ]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in self.workers:
            self._idle.put_nowait(worker)
        self._repairs: set[asyncio.Task[None]] = set()

    def check_folders(self) -> None:
        """Have every worker look at the reward model's folder: nodes of the RM's own may lack it.

        Raises:
            RMError: it is not there, or a worker does not start within `reward_model.timeout_s`.
        """
        self._all([worker.actor.check.remote() for worker in self.workers])

    def start_loading(self) -> None:
        """Have every worker load the reward model, without waiting for it; `wait_ready` tells what came of it."""
        for worker in self.workers:
            worker.actor.load.remote()

    def wait_ready(self) -> list[str]:
        """Load the reward model in every worker; what each of them holds.

        Raises:
            RMError: a worker can't load it, or is not ready within `reward_model.timeout_s`.
        """
        return self._all([worker.actor.load.remote() for worker in self.workers])

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """The answers of all workers, within `reward_model.timeout_s`."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return list(ray.get(calls, timeout=self.timeout_s))
        except GetTimeoutError as error:
            raise RMError(
                f"not all of {len(calls)} RM workers were ready within reward_model.timeout_s={self.timeout_s:g}: "
                "the RM loads slowly, or Ray has no room for a worker (`ray status`)\n"
                "  fix: a longer reward_model.timeout_s"
            ) from error
        except RayError as error:
            raise RMError(f"the RM can't be loaded: {reason(error)}") from error

    def take_seconds(self) -> float:
        """Seconds of scoring per worker since the last call; what a worker did before it died is not in it."""
        import ray
        from ray.exceptions import RayError

        calls = [worker.actor.take_seconds.remote() for worker in self.workers]
        seconds = 0.0
        for call in ray.wait(calls, num_returns=len(calls), timeout=CLOCK_S)[0]:
            with suppress(RayError):
                seconds += ray.get(call)
        return seconds / len(calls)

    async def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Score one batch on an idle worker; on failure on the next ones.

        Raises:
            RMError: every one of `reward_model.retries` + 1 attempts failed or took longer than the time limit.
        """
        attempts, failures = self.settings.reward_model.retries + 1, list[str]()
        for _ in range(attempts):
            worker = await self._take(failures)
            try:
                call = asyncio.wrap_future(worker.actor.score.remote(conversations).future())
                scores: list[Score] = await asyncio.wait_for(call, self.timeout_s)
            except Exception as error:
                failures.append(f"worker {worker.index}: {self._describe(error)}")
                self._repair(worker, error)
                continue
            self._idle.put_nowait(worker)
            return scores
        raise RMError(
            f"the reward model failed on a batch of {len(conversations)} replies, {attempts} times\n"
            + "\n".join(f"  {failure}" for failure in failures)
        )

    async def _take(self, failures: Sequence[str]) -> _Worker:
        try:
            return await asyncio.wait_for(self._idle.get(), self._queue_limit())
        except asyncio.TimeoutError as error:
            past = "".join(f"\n  {failure}" for failure in failures)
            raise RMError(
                f"none of {len(self.workers)} RM workers became free within {self._queue_limit():g} s{past}\n"
                "  fix: more reward_model.num_workers, or a longer reward_model.timeout_s"
            ) from error

    def _queue_limit(self) -> float:
        """Seconds after which waiting for a worker is a failure: each of the others may use up all its attempts."""
        return self.timeout_s * (self.settings.reward_model.retries + 2)

    def _describe(self, error: Exception) -> str:
        if isinstance(error, asyncio.TimeoutError):
            return f"no answer within reward_model.timeout_s={self.timeout_s:g} s"
        return reason(error)

    def _repair(self, worker: _Worker, error: Exception) -> None:
        """Put the worker back: at once if it answered, in the background if it hangs or died."""
        if isinstance(error, UpsRmError):
            self._idle.put_nowait(worker)
            return
        print(f"RM worker {worker.index} is started again, its batch goes to an idle one: {self._describe(error)}")
        task = asyncio.create_task(self._bring_back(worker, kill=isinstance(error, asyncio.TimeoutError)))
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _bring_back(self, worker: _Worker, *, kill: bool) -> None:
        """Wait until Ray has restarted the worker and it has its model; one that does not come back is left out."""
        import ray
        from ray.exceptions import RayError

        if kill:  # it computes something that nobody waits for any more, or hangs
            ray.kill(worker.actor, no_restart=False)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s
        while (left := deadline - loop.time()) > 0:
            try:
                await asyncio.wait_for(asyncio.wrap_future(worker.actor.load.remote().future()), left)
            except UpsRmError as error:  # it is back, and will say the same to the next call
                print(f"RM worker {worker.index} can't load its model again: {reason(error)}")
            except (RayError, asyncio.TimeoutError):
                await asyncio.sleep(PING_PAUSE_S)
                continue
            self._idle.put_nowait(worker)
            return
        print(f"RM worker {worker.index} did not come back within {self.timeout_s:g} s and is left out")


def reason(error: BaseException) -> str:
    """One error of a worker as text: our own message without Ray's traceback, else its class and first line."""
    if isinstance(error, UpsRmError):
        cause = getattr(error, "cause", None)  # Ray raises a subclass whose text is a traceback
        return str(cause if isinstance(cause, UpsRmError) else error)
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    first = str(shown).strip().splitlines()
    return f"{type(shown).__name__}: {first[0]}" if first else type(shown).__name__
