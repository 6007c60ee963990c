"""RM workers and reward manager under a real local Ray: the numbers of one process, and every fault ends in its error.

verl itself is not run here, but its own hook loads the manager, with verl's own configuration.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from faulty_rms import nan_rm, slow_rm, some_conversations
from tiny import tiny_rm
from ups_rm.distributed.failures import as_error, as_failure, failure_board, read_failure, write_failure
from ups_rm.distributed.rewards import check_placement, verl_overrides
from ups_rm.distributed.rm_workers import PoolSettings, RMPool, check_capacity, open_worker_scorer, worker_options
from ups_rm.distributed.step_record import score_of
from ups_rm.distributed.translate import hydra_value
from ups_rm.errors import DataError, RecipeError, RMError, RunError
from ups_rm.recipe import Recipe, RewardModel, RewardModelModel, load_recipe
from ups_rm.reward.open import open_scorer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.types import Conversation

ray = pytest.importorskip("ray")
pytest.importorskip("verl")
pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        resources={"ups_rm": 2},
    )
    yield
    ray.shutdown()
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, alive


def settings(folder: Path, **changes: Any) -> PoolSettings:
    own_code = bool(changes.pop("trust_remote_code", False))
    model = RewardModelModel(path=str(folder), trust_remote_code=own_code, dtype="float32")
    values = {"num_workers": 2, "timeout_s": 120.0, "retries": 1, "max_batch_tokens": 512} | changes
    return PoolSettings(RewardModel(model=model, **values))


def end_workers() -> None:
    """The next pool gets workers of its own."""
    for name in ("ups_rm_worker_0", "ups_rm_worker_1", "ups_rm_failures"):
        try:
            ray.kill(ray.get_actor(name))
        except ValueError:
            continue
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the name is free a moment later
            try:
                ray.get_actor(name)
            except ValueError:
                break
            time.sleep(0.05)


@pytest.fixture
def fresh(cluster: None) -> None:
    end_workers()


def test_logits_equal_those_of_one_process(fresh: None, rm_folder: Path) -> None:
    conversations = some_conversations(40)
    batches = [conversations[i : i + 7] for i in range(0, 40, 7)]
    here = RewardScorer.load(rm_folder, dtype="float32")
    started = time.perf_counter()
    expected = [score for batch in batches for score in here.score(batch)]
    spent = time.perf_counter() - started
    first, second = RMPool(settings(rm_folder)), RMPool(settings(rm_folder))
    assert first.wait_ready() == second.wait_ready()  # lines that name the processes: both pools have the same workers
    assert first.take_seconds() == 0

    async def score() -> list[float]:
        pools = [RMPool(settings(rm_folder)) for _ in range(2)]
        answers = await asyncio.gather(*(pools[i % 2].score(batch) for i, batch in enumerate(batches)))
        return [score.logit for answer in answers for score in answer]

    assert asyncio.run(score()) == pytest.approx([score.logit for score in expected], abs=1e-5)
    assert spent / 20 < first.take_seconds() < 20 * spent  # mean of two workers that did half of it each
    assert second.take_seconds() == 0  # taken


def verl_config(folder: Path, *changes: str) -> Any:
    """verl's own configuration with our overrides, composed by Hydra."""
    common = [f"reward_model.model.path={folder}", "reward_model.model.dtype=float32", "reward_model.num_workers=2"]
    return composed(load_recipe("quickstart", [*common, *changes], engine="verl"))


def composed(recipe: Recipe) -> Any:
    import verl
    from hydra import compose, initialize_config_dir

    overrides = verl_overrides(recipe)
    texts = [f"{key}={hydra_value(value)}" for key, value in overrides.items()]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=[*texts, "trainer.device=cpu"])


def as_verl_gives_it(tokenizer: Any, conversation: Conversation) -> Any:
    """One reply as verl's agent loop hands it to a reward manager."""
    import numpy as np
    import torch
    from tensordict import TensorDict
    from verl import DataProto

    *prompt, reply = conversation
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    response_ids = [*tokenizer(reply["content"])["input_ids"], tokenizer.eos_token_id]
    rows = {
        "prompts": [prompt_ids],
        "responses": [response_ids],
        "attention_mask": [[1] * (len(prompt_ids) + len(response_ids))],
    }
    raw_prompt, info = np.empty(1, dtype=object), np.empty(1, dtype=object)
    raw_prompt[0], info[0] = prompt, {"index": 0, "kind": "benign"}
    batch = TensorDict({name: torch.tensor(row) for name, row in rows.items()}, batch_size=1)
    return DataProto(batch=batch, non_tensor_batch={"raw_prompt": raw_prompt, "extra_info": info})


def test_the_manager_scores_by_sigmoid_of_minus_the_logit(fresh: None, rm_folder: Path, policy_folder: Path) -> None:
    """Through verl's own loader; the logit by plain transformers, conversation by conversation."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer
    from verl.trainer.ppo.reward import load_reward_manager

    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    conversations = some_conversations(12, seed=1)
    conversations[3][-1]["content"] = "I'm sorry, but I can't help with that."

    async def score() -> list[dict[str, Any]]:
        manager = load_reward_manager(verl_config(rm_folder), tokenizer)
        items = [as_verl_gives_it(tokenizer, conversation) for conversation in conversations]
        return list(await asyncio.gather(*(manager.run_single(item) for item in items)))

    answers = asyncio.run(score())
    rm = AutoModelForTokenClassification.from_pretrained(rm_folder, trust_remote_code=True, dtype=torch.float32).eval()
    its_tokenizer = AutoTokenizer.from_pretrained(rm_folder)
    for i, (conversation, answer) in enumerate(zip(conversations, answers, strict=True)):
        text = its_tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = torch.tensor([its_tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logit = float(rm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
        extra = answer["reward_extra_info"]
        assert extra["logit"] == pytest.approx(logit, abs=2e-5)
        assert answer["reward_score"] == extra["safe_score"] == pytest.approx(1 / (1 + math.exp(logit)), abs=1e-5)
        assert (extra["benign"], extra["refusal"]) == (1.0, float(i == 3))
        assert extra["rm_tokens"] == ids.shape[1]


def test_a_served_rm_gives_client_and_manager_the_logits_of_one_process(
    fresh: None, rm_folder: Path, policy_folder: Path
) -> None:
    """The real `ups-rm rm serve` in a process of its own, over a real socket: the same numbers three ways."""
    from transformers import AutoTokenizer
    from verl.trainer.ppo.reward import load_reward_manager

    from ups_rm.reward.client import HttpScorer

    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    conversations = some_conversations(24, seed=5)
    expected = [score.logit for score in RewardScorer.load(rm_folder, dtype="float32").score(conversations)]
    assert max(expected) - min(expected) > 0.1

    async def managed(url: str) -> list[dict[str, Any]]:
        common = ["reward_model.placement=http", "reward_model.num_workers=2"]
        recipe = load_recipe("quickstart", [f"reward_model.model.url={url}", *common], engine="verl")
        manager = load_reward_manager(composed(recipe), tokenizer)
        items = [as_verl_gives_it(tokenizer, conversation) for conversation in conversations]
        return list(await asyncio.gather(*(manager.run_single(item) for item in items)))

    command = [sys.executable, "-m", "ups_rm", "rm", "serve", str(rm_folder), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if "answers at " in line), None)
            assert line is not None, f"the server ended with exit code {server.wait()}"
            url = line.partition("answers at ")[2].split()[0]
            with HttpScorer(url) as client:
                served = [score.logit for score in client.score(conversations)]
            answers = asyncio.run(managed(url))
        finally:
            server.kill()
    assert served == pytest.approx(expected, abs=1e-5)
    assert [answer["reward_extra_info"]["logit"] for answer in answers] == pytest.approx(expected, abs=1e-5)
    safe = [1 / (1 + math.exp(logit)) for logit in expected]
    assert [answer["reward_score"] for answer in answers] == pytest.approx(safe, abs=1e-5)


class PoolHere:
    """Stands for the Ray actors: one scorer in this process, opened from verl's configuration as a worker does."""

    def __init__(self, settings: PoolSettings) -> None:
        self.scorer = open_worker_scorer(settings, 0)

    async def score(self, conversations: list[Conversation]) -> list[Any]:
        return self.scorer.score(list(conversations))


@pytest.mark.parametrize("second", [False, True])
def test_the_manager_gives_the_helpfulness_of_one_process(
    rm_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bool
) -> None:
    """Of a folder with two heads, and of a second folder; it stands in `reward_extra_info`, and only where it is."""
    from transformers import AutoTokenizer

    from ups_rm.distributed import reward_manager

    monkeypatch.setattr(reward_manager, "RMPool", PoolHere)
    monkeypatch.setattr(reward_manager, "failure_board", lambda: None)
    tokenizer, conversations = AutoTokenizer.from_pretrained(policy_folder), some_conversations(8, seed=3)
    heads = ("helpfulness",) if second else ("unsafety", "helpfulness")
    folder = tiny_rm(tmp_path / "rm", heads=heads)
    more = [f"reward_model.helpfulness.path={folder}", "reward_model.helpfulness.dtype=float32"] if second else []

    async def score(rm: Path, *changes: str) -> list[dict[str, Any]]:
        manager = reward_manager.SafetyRewardManager(verl_config(rm, *changes), tokenizer)
        items = [as_verl_gives_it(tokenizer, conversation) for conversation in conversations]
        return [answer["reward_extra_info"] for answer in await asyncio.gather(*map(manager.run_single, items))]

    extras = asyncio.run(score(rm_folder if second else folder, *more))
    expected = RewardScorer.load(folder, dtype="float32", safety=False).helpfulness(conversations)
    assert [extra["helpfulness"] for extra in extras] == pytest.approx(expected, abs=1e-5)
    assert [score_of(extra).helpfulness for extra in extras] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    assert not any("helpfulness" in extra for extra in asyncio.run(score(rm_folder)))


def test_workers_open_whatever_the_recipe_combines(rm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several models, a function among them, and another transform, through verl's configuration and back."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "reward"))
    models = [{"path": str(rm_folder), "dtype": "float32", "normalize": "none"}]
    models += [{"callable": "scorers_for_tests:length", "weight": 2.0, "normalize": "fixed", "mean": 9.0, "std": 3.0}]
    recipe = load_recipe(
        "quickstart", [f"reward_model.models={json.dumps(models)}", "reward_model.transform=logsigmoid"], engine="verl"
    )
    opened = open_worker_scorer(PoolSettings.from_verl(composed(recipe)), 0)
    conversations = some_conversations(5)
    scores = opened.score(conversations)
    assert scores == open_scorer(recipe.reward_model).score(conversations)
    assert [len(score.model_logits) for score in scores] == [2] * 5


def test_workers_killed_in_mid_call_come_back(fresh: None, rm_folder: Path, tmp_path: Path) -> None:
    """Both at once, so that no other worker is left to take over."""
    slow = slow_rm(tmp_path / "slow-1s", rm_folder, 1.0)
    batches = [some_conversations(3, seed) for seed in (0, 1)]

    async def run() -> list[list[float]]:
        pool = RMPool(settings(slow, trust_remote_code=True))
        processes = [int(line.rsplit(" ", 1)[1].rstrip(")")) for line in pool.wait_ready()]
        running = [asyncio.create_task(pool.score(batch)) for batch in batches]
        await asyncio.sleep(0.4)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        return [[score.logit for score in await task] for task in running]

    here = RewardScorer.load(rm_folder, dtype="float32")
    for batch, logits in zip(batches, asyncio.run(run()), strict=True):  # transformers' layers there, ours here
        assert logits == pytest.approx([score.logit for score in here.score(batch)], abs=1e-5)


def test_nan_ends_in_an_error_that_stays(
    fresh: None, rm_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On workers that take the resource of their nodes; and our trainer raises it, though verl's step hides it."""
    from transformers import AutoTokenizer
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from ups_rm.distributed.verl_trainer import SafetyTrainer

    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    config = verl_config(nan_rm(tmp_path / "nan", rm_folder), "reward_model.placement=node", "reward_model.retries=1")
    both = (
        r"failed on a batch of 1 replies, 2 times\n  worker 0: the RM's logit is nan(.|\n)*\n  worker 1: the RM's logit"
    )

    async def run() -> None:
        manager = load_reward_manager(config, tokenizer)
        item = as_verl_gives_it(tokenizer, some_conversations(1)[0])
        with pytest.raises(RMError, match=both):
            await manager.run_single(item)
        started = time.perf_counter()
        with pytest.raises(RMError, match=both):
            await manager.run_single(item)
        assert time.perf_counter() - started < 0.05  # nothing is scored any more

    asyncio.run(run())
    assert ray.available_resources().get("ups_rm", 0) == 0
    monkeypatch.setattr(PPOTrainerSync, "fit", lambda self, _: self.step({}, {}))
    monkeypatch.setattr(PPOTrainerSync, "step", lambda *_: "a batch of the replies that are left")
    trainer = SafetyTrainer.__new__(SafetyTrainer)
    trainer.board, trainer.folder = failure_board(), tmp_path / "run"
    with pytest.raises(RMError, match=both):
        trainer.fit(None)
    assert "logit is nan" in str(read_failure(tmp_path / "run"))  # from which the command prints it


def test_a_slow_rm_ends_at_the_time_limit(fresh: None, rm_folder: Path, tmp_path: Path) -> None:
    slow = slow_rm(tmp_path / "slow-60s", rm_folder, 60.0)
    started = time.perf_counter()

    async def run() -> None:
        pool = RMPool(settings(slow, trust_remote_code=True))
        pool.wait_ready()
        pool.timeout_s = 2.0
        with pytest.raises(
            RMError, match=r"worker 0: no answer within reward_model\.timeout_s=2 s\n  worker 1: no answer"
        ):
            await pool.score(some_conversations(2))

    asyncio.run(run())
    assert time.perf_counter() - started < 60


def test_what_can_not_be_loaded_is_named(fresh: None, tmp_path: Path) -> None:
    with pytest.raises(RMError, match="no-such-rm"):
        RMPool(settings(tmp_path / "no-such-rm", num_workers=1)).wait_ready()


def test_a_folder_that_the_rms_nodes_lack_is_told_before_verl_sets_anything_up(
    fresh: None, rm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our trainer, with verl's part of its set-up put aside."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from ups_rm.distributed.verl_trainer import SafetyTrainer

    reached: list[str] = []
    one_on_a_node = ("reward_model.placement=node", "reward_model.num_workers=1")
    monkeypatch.setattr(PPOTrainerSync, "init", lambda self: reached.append(str(self.folder)))

    def init(folder: Path) -> None:
        trainer = SafetyTrainer.__new__(SafetyTrainer)
        trainer.config = OmegaConf.create(OmegaConf.to_container(verl_config(folder, *one_on_a_node), resolve=False))
        trainer.folder = tmp_path / "run"
        trainer.init()

    with pytest.raises(RMError, match="no-such-rm"):
        init(tmp_path / "no-such-rm")
    assert reached == []
    assert "no-such-rm" in str(read_failure(tmp_path / "run"))
    end_workers()
    init(rm_folder)
    assert reached == [str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        ({"placement": "own", "num_workers": 2}, 9, "needs 2 GPUs beside the 8"),
        ({"placement": "node", "num_workers": 1}, 8, "needs 1 GPUs beside the 8"),
        ({"placement": "shared", "num_workers": 9}, 8, "only 8 training GPUs"),
        ({"placement": "node", "num_workers": 3}, 11, "'ups_rm', 3 workers need one each"),
    ],
)
def test_too_few_devices_are_an_error_at_once(changes: dict[str, Any], gpus: int, message: str) -> None:
    ours = settings(Path("rm"), **changes)
    with pytest.raises(RMError, match=message):
        check_capacity(PoolSettings(ours.reward_model, "cuda", 8, 8), {"GPU": gpus, "ups_rm": 2})


def test_what_ray_is_asked_for() -> None:
    def options(placement: str, device: str = "cuda") -> dict[str, Any]:
        return worker_options(PoolSettings(settings(Path("rm"), placement=placement).reward_model, device, 8, 8), 1)

    assert options("own")["num_gpus"] == 1
    assert (options("node")["num_gpus"], options("node")["resources"]) == (1, {"ups_rm": 1})
    assert options("http")["num_gpus"] == 0
    assert options("own", "cpu")["num_gpus"] == 0
    assert options("own")["num_cpus"] == 0


def test_failures_travel_as_what_they_are(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    write_failure(tmp_path / "run", RMError("no RM\n  fix: one"))
    found = read_failure(tmp_path / "run")
    assert type(found) is RMError
    assert str(found) == "no RM\n  fix: one"
    assert type(as_error(as_failure(DataError("rows")))) is DataError
    foreign = as_error(as_failure(ValueError("other people's")))
    assert type(foreign) is RunError
    assert str(foreign) == "ValueError: other people's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reward_model.model.url=http://127.0.0.1:1"], "placement=http"),
        (["reward_model.model.path=rm", "reward_model.placement=http"], "rm is no service"),
        (["reward_model.model.path=judge", "reward_model.model.kind=pairwise"], "verl scores reply by reply"),
    ],
)
def test_placements_that_do_not_fit_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_placement(load_recipe("quickstart", changes, engine="verl").reward_model)


def test_a_service_that_does_not_answer_is_named(fresh: None) -> None:
    """placement=http: something else has the port (a socket that never says a word)."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        model = RewardModelModel(url=f"http://127.0.0.1:{other.getsockname()[1]}")
        service = RewardModel(model=model, placement="http", num_workers=1, timeout_s=20.0, retries=0)

        async def run() -> None:
            pool = RMPool(PoolSettings(service))
            pool.wait_ready()
            pool.timeout_s = 3.0
            with pytest.raises(RMError, match=r"worker 0: no answer within reward_model\.timeout_s=3 s"):
                await pool.score(some_conversations(1))

        asyncio.run(run())
