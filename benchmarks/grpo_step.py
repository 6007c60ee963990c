"""One GRPO step of the local engine and one of TRL's GRPOTrainer, in turn, on the same work.

SmolLM2-135M, 8 prompts x 4 replies, KL to the frozen reference in the loss with coefficient 0.001, AdamW. TRL runs in
its best sound setting (fp32 weights, bf16 autocast, all replies in one micro batch) and, as a case of its own, with
bf16 weights, where updates of 1e-6 round away; of LoRA the frozen base is bf16 on both sides, the adapters fp32. On a
CPU that does not compute in bf16, where torch's bf16 is ten times slower than its fp32, both sides are fp32 throughout
and the case with bf16 weights is left out. A step is everything from prompts to changed weights. Both sides take the
same prompts in the same steps, and count the reply tokens that they made. TRL runs in a process of its own, with the
same threads and waiting as ours: what we ask of malloc holds for a whole process, and would make its steps faster than
its users see them. Of the two cases with RM scoring, TRL asks our scorer in one, and in the other the model itself, in
bf16, by its own `reward_funcs`.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from unittest import mock

from benchmarks.machine import computes_in_bf16, step_floor
from benchmarks.result import Result, versions
from benchmarks.rm_scoring import plain_model
from ups_rm.layers.native import kernels
from ups_rm.local.trainer import Trainer
from ups_rm.recipe import load_recipe
from ups_rm.types import Conversation, Score

SUBJECTS = ("bread", "a small garden", "old bicycles", "the night sky", "a school trip", "cold coffee", "paper boats",
            "winter coats", "piano lessons", "house plants", "a mountain hike", "lost keys")  # fmt: skip
QUESTIONS = (
    "What should I know about {} before I begin, and which mistakes do most people make at first?",
    "Write a short and polite letter to my neighbour in which I ask for some advice about {} please.",
    "Explain {} to a child of ten years in a few simple sentences, with one example from daily life.",
)
STEP = "TRL's step:"
FILLER = "For context, here is what I have tried so far and what came of it on each of the last days. "


@dataclass(frozen=True)
class Case:
    """One size of the step. `words`: least and most words that a prompt is filled up with; `peer_scores`: TRL asks the
    RM by its own means; `model`: another policy; `native`: with our C++ kernels where they can be built;
    `peer_settings`: other values of TRL's GRPOConfig."""

    name: str
    prompts: int = 8
    n: int = 4
    new_tokens: int = 64
    words: tuple[int, int] = (0, 0)
    lora_rank: int = 0
    peer_dtype: str = "float32"
    with_rm: bool = False
    peer_scores: bool = False
    model: str = ""
    native: bool = True
    peer_settings: dict[str, Any] = field(default_factory=dict)


QUARTERS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
"""Of TRL's 32 rows, where all at once take more than 17 GB; of 64 rows twice as many."""
BASE = Case("8 prompts x 4 replies x 64 tokens")
EAGER = {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}}
"""Faster for TRL than sdpa at this size (`trl_settings`)."""
HALF = replace(BASE, name="the same, TRL with bf16 weights", peer_dtype="bfloat16")
CASES = (
    BASE,
    replace(BASE, name="the same, none of our C++", native=False),
    replace(BASE, name="the same, TRL with eager attention", peer_settings=EAGER),
    HALF,
    replace(BASE, name="256 new tokens, early ends", new_tokens=256, peer_settings=QUARTERS),
    replace(BASE, name="prompts of 50-600 tokens", words=(0, 500), peer_settings=QUARTERS),
    replace(BASE, name="n = 8", n=8, peer_settings=QUARTERS | {"per_device_train_batch_size": 16}),
    replace(BASE, name="LoRA of rank 16", lora_rank=16, peer_dtype="bfloat16"),
    replace(BASE, name="with RM scoring", with_rm=True),
    replace(BASE, name="with RM scoring, TRL by its own means", with_rm=True, peer_scores=True),
)


class LengthScorer:
    """Prefers replies of about 150 characters: costs nothing, so the step alone is measured."""

    def score(self, conversations: list[Conversation]) -> list[Score]:
        logits = [abs(len(conversation[-1]["content"]) - 150) / 100 for conversation in conversations]
        return [Score(logit, -logit, 0, False) for logit in logits]


def chats(case: Case) -> list[Conversation]:
    """Distinct harmless prompts, the same for both sides."""
    draw, filler = random.Random(0), FILLER.split()
    questions = [question.format(subject) for subject in SUBJECTS for question in QUESTIONS]
    draw.shuffle(questions)
    lengths = [draw.randint(*case.words) for _ in questions]
    extra = [" ".join(filler[i % len(filler)] for i in range(length)) for length in lengths]
    return [
        [{"role": "user", "content": f"{question} {more}".strip()}]  # no more than the template's words begin them all
        for more, question in zip(extra, questions, strict=True)
    ]


def picked(case: Case, step: int) -> list[int]:
    """Which of the `chats` a step takes; steps count from 1."""
    return random.Random(step).sample(range(len(SUBJECTS) * len(QUESTIONS)), case.prompts)


@dataclass(frozen=True)
class Cost:
    """Of one step."""

    wall: float
    cpu: float
    tokens: int


def our_step(case: Case, folder: Path, scorer: Any) -> Callable[[], Cost]:
    """The local engine, ready to take one step per call."""
    return our_trainer(case, folder, scorer)[1]


def our_trainer(case: Case, folder: Path, scorer: Any) -> tuple[Trainer, Callable[[], Cost]]:
    """The local engine, and what takes one step of it per call."""
    from ups_rm.data.prompts import PromptRow

    rows = [PromptRow(i, messages, "benign", {}) for i, messages in enumerate(chats(case))]
    overrides = {
        "data.train_files": _parquet(folder / "prompts.parquet", case),
        "data.train_batch_size": case.prompts,
        "data.max_prompt_length": 1024,
        "data.max_response_length": case.new_tokens,
        "data.benign_share": -1,
        "data.unique_prompts": "false",
        "actor_rollout_ref.model.lora_rank": case.lora_rank,
        "actor_rollout_ref.actor.ppo_mini_batch_size": case.prompts,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": case.prompts * case.n,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        "actor_rollout_ref.actor.use_kl_loss": "true",
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.rollout.n": case.n,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "algorithm.use_kl_in_reward": "false",
        "trainer.test_freq": -1,
        "trainer.default_local_dir": str(folder / "run"),
    }
    if case.model:
        overrides["actor_rollout_ref.model.path"] = case.model
    with used(case.native):
        trainer = Trainer(load_recipe("quickstart", [f"{key}={value}" for key, value in overrides.items()]), scorer)
    count = 0

    def step() -> Cost:
        nonlocal count
        count += 1
        prompts = [rows[i] for i in picked(case, count)]
        wall, cpu = perf_counter(), process_time()
        with used(case.native):
            record = trainer.step(prompts, count)
        cost = Cost(perf_counter() - wall, process_time() - cpu, int(record.rollout.sequences.response_mask.sum()))
        print("  ours", {name: round(value, 2) for name, value in record.seconds.items()}, flush=True)
        return cost

    return trainer, step


def _parquet(file: Path, case: Case) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": "PKU-SafeRLHF",
            "prompt": messages,
            "ability": "safety",
            "reward_model": {"style": "model", "ground_truth": None},
            "extra_info": {"split": "train", "index": i, "prompt_source": "benign"},
        }
        for i, messages in enumerate(chats(case))
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def trl_steps(case: Case, folder: Path, scorer: Any, pairs: int, between: Callable[[], None]) -> list[Cost]:
    """TRL's steps after one of warm-up; `between` runs after each of them. With `peer_scores` TRL asks the RM itself,
    and what `scorer` says counts for nothing."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from ups_rm.models import fetch

    costs: list[Cost] = []
    tokens = 0

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        tokens = sum(map(len, completion_ids))
        talks = [[*prompt, *reply] for prompt, reply in zip(prompts, completions, strict=True)]
        return [score.safe_score for score in scorer.score(talks)]

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = perf_counter(), process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = self.started
            costs.append(Cost(perf_counter() - wall, process_time() - cpu, tokens))
            print(STEP, json.dumps(asdict(costs[-1])), flush=True)
            between()

    adapters, half = case.lora_rank > 0, computes_in_bf16()
    given: dict[str, Any] = {
        "per_device_train_batch_size": case.prompts * case.n,
        "bf16": half and (case.peer_dtype == "float32" or adapters), "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": case.peer_dtype if half else "float32", "attn_implementation": "sdpa"},
    }  # fmt: skip
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), num_generations=case.n, max_completion_length=case.new_tokens, beta=0.001,
        learning_rate=1e-6, max_steps=pairs + 1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, seed=0, temperature=1.0, shuffle_dataset=False, **(given | case.peer_settings),
    )  # fmt: skip
    rewards: dict[str, Any] = {"reward_funcs": reward}
    if case.peer_scores:
        model, tokenizer = plain_model(reward_model(folder, case.model), "bfloat16" if half else "float32")
        rewards = {"reward_funcs": [model, reward], "reward_processing_classes": [tokenizer, None]}
        settings.reward_weights = [-1.0, 0.0]  # the model's logit says how unsafe a reply is
    lora = LoraConfig(r=case.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    talks = chats(case)
    data = Dataset.from_list([{"prompt": talks[i]} for step in range(pairs + 1) for i in picked(case, step + 1)])
    trainer = GRPOTrainer(
        model=case.model or str(fetch()),
        **rewards,
        args=settings,
        train_dataset=data,
        peft_config=lora,
        callbacks=[Timer()],
    )
    trainer.train()
    return costs[1:]


def main(arguments: Sequence[str]) -> None:
    """What `trl_in_turn` starts: a step of TRL, its cost on a line, and the next when a line is read."""
    given, pairs = json.loads(arguments[0]), int(arguments[1])
    case = Case(**given | {"words": tuple(given["words"])})
    with tempfile.TemporaryDirectory() as name:
        scorer = _scorer(case, Path(name)) if not case.peer_scores else LengthScorer()
        trl_steps(case, Path(name), scorer, pairs, lambda: print(input(), flush=True))


def trl_in_turn(case: Case, pairs: int, between: Callable[[], None]) -> list[Cost]:
    """TRL's steps after one of warm-up, in a process that waits while `between` runs after each of them."""
    command = [sys.executable, "-m", "benchmarks.grpo_step", json.dumps(asdict(case)), str(pairs)]
    costs: list[Cost] = []
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(STEP):
                costs.append(Cost(**json.loads(line.removeprefix(STEP))))
                print("  TRL", costs[-1], flush=True)
                between()
                print("next", file=process.stdin, flush=True)
    if process.returncode:
        raise RuntimeError(f"TRL's process ended with exit code {process.returncode}")
    return costs[1:]


def measure(case: Case, pairs: int, profile: Path | None) -> list[Result]:
    """Medians over the pairs: wall and CPU seconds of a step, and reply tokens made in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step, ours = our_step(case, folder, _scorer(case, folder)), []
        theirs = trl_in_turn(case, pairs, lambda: ours.append(step()))
        ours = ours[1:]
        if profile is not None:
            _trace(step, profile.with_name(f"{profile.stem}-{CASES.index(case)}{profile.suffix}"))
    reply_tokens = statistics.median(cost.tokens for cost in ours)
    floor = _floor(case, reply_tokens)
    with_kernels = "built" if case.native and kernels() is not None else "none"
    programs = versions("torch", "transformers", "trl", "peft") | {"our C++ kernels": with_kernels}
    name = f"GRPO step, {case.name}"
    peer = f"TRL GRPOTrainer, {_peer_formats(case)}"

    def middle(costs: list[Cost], what: str) -> float:
        return statistics.median(getattr(cost, what) for cost in costs)

    return [
        Result(f"{name}, wall", middle(ours, "wall"), middle(theirs, "wall"), "s", peer, floor, programs),
        Result(f"{name}, CPU", middle(ours, "cpu"), middle(theirs, "cpu"), "CPU s", peer, None, programs),
        Result(f"{name}, our reply tokens", middle(ours, "tokens"), None, "tokens", versions=programs),
        Result(f"{name}, TRL's reply tokens", middle(theirs, "tokens"), None, "tokens", versions=programs),
    ]


def _peer_formats(case: Case) -> str:
    if not computes_in_bf16():
        return "fp32 throughout"
    if case.lora_rank:
        return "bf16 base, bf16 autocast"
    return "fp32 weights, bf16 autocast" if case.peer_dtype == "float32" else "bf16 weights"


def used(native: bool) -> Any:
    """Within: our kernels as they are, or none."""
    from ups_rm.layers import native as module

    return mock.patch.object(module, "kernels", module.kernels if native else lambda: None)


def _floor(case: Case, reply_tokens: float) -> float:
    """See `machine.step_floor`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ups_rm.data.prompts import encode_prompts
    from ups_rm.layers.grid import Distinct
    from ups_rm.models import fetch

    source = case.model or fetch()
    prompts = encode_prompts(AutoTokenizer.from_pretrained(source), chats(case))
    # what all begin with, the template's words, is computed once
    read = [len(Distinct.of([prompts[i] for i in picked(case, step)]).ids) for step in range(2, 7)]
    model = AutoModelForCausalLM.from_pretrained(source)
    head = model.get_output_embeddings().weight.numel()
    return step_floor(
        statistics.mean(read), reply_tokens, case.new_tokens,
        body=model.num_parameters() - head, head=head, lora=case.lora_rank > 0, with_rm=case.with_rm,
    )  # fmt: skip


def _scorer(case: Case, folder: Path) -> Any:
    from ups_rm.reward.scorer import RewardScorer

    return RewardScorer.load(reward_model(folder, case.model)) if case.with_rm else LengthScorer()


def reward_model(folder: Path, backbone: str = "") -> Path:
    """An RM folder within, with a head of no training on the policy that a case names."""
    from transformers import AutoConfig

    from ups_rm.models import fetch
    from ups_rm.reward.merge import merge

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import tiny_head

    source = backbone or fetch()
    size = AutoConfig.from_pretrained(source).hidden_size
    merge(source, tiny_head(folder / "head", hidden_size=size, hidden_dims=(64, 16)), folder / "rm")
    return folder / "rm"


def _trace(step: Callable[[], Cost], file: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    file.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(file))
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), flush=True)


def run(pairs: int = 5, only: str = "", profile: Path | None = None) -> list[Result]:
    """Every case whose name contains `only`, on a CPU without bf16 all but the one with bf16 weights."""
    cases = [case for case in CASES if only in case.name]
    if not computes_in_bf16() and HALF in cases:
        cases.remove(HALF)
        print(f"left out: {HALF.name}: this CPU does not compute in bf16", flush=True)
    return [one for case in cases for one in measure(case, pairs, profile)]


if __name__ == "__main__":
    main(sys.argv[1:])
