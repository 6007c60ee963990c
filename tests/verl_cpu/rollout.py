"""Generation on a CPU behind verl's rollout registry, in place of vLLM (`rollout.name=cpu_hf`).

Each replica is a Ray actor with a copy of the policy; verl's checkpoint engine pushes the trained weights to it. What
it samples is a function of seed, weights and prompt, so that a resumed run can be compared with one that ran through;
and it is written to VERL_CPU_DUMP, since verl's own dumps hold no token ids. With the weights of step VERL_CPU_HOLD it
stops after its first reply.
Loaded by `actor_rollout_ref.model.external_lib` in the workers, which is also where verl's FSDP engine has to learn
that it runs on the device "cpu".
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "cpu_hf"

# verl offloads the frozen reference with pinned memory, which only an accelerator can pin.
transformer_impl.CPUOffloadPolicy = lambda pin_memory=True: CPUOffloadPolicy(pin_memory=False)
# verl registers its FSDP engine for cuda and npu.
if "cpu" not in EngineRegistry._engines["language_model"]["fsdp2"]:
    EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
        transformer_impl.FSDPEngineWithLMHead
    )


class Server:
    """Samples token by token from the weights that it was last given; refuses before the first."""

    def __init__(self, path: str, seed: int, limit: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.seed, self.asked = seed, Counter[str]()
        config = AutoConfig.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        self.eos, self.limit = AutoTokenizer.from_pretrained(path).eos_token_id, limit
        self.step: int | None = None
        self.lock = asyncio.Lock()

    async def load_weights(self, weights: list[tuple[str, torch.Tensor]], step: int | None) -> None:
        async with self.lock:
            state = self.model.state_dict()
            with torch.no_grad():
                for name, value in weights:
                    state[name].copy_(value)
            missing = set(state) - {name for name, _ in weights}
            if missing - ({"lm_head.weight"} if self.model.config.tie_word_embeddings else set()):
                raise RuntimeError(f"weights that verl did not send: {missing}")
            self.step = step if step is not None else 0

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        if self.step is None:
            raise RuntimeError("no weights have come from the trainer")
        async with self.lock:
            tokens, logprobs, ended = self.sample(prompt_ids, sampling_params)
            row = {"weights": self.step, "prompt": prompt_ids, "tokens": tokens, "logprobs": logprobs}
            with Path(os.environ["VERL_CPU_DUMP"]).open("a", encoding="utf-8") as dump:
                dump.write(json.dumps(row) + "\n")
            if str(self.step) == os.environ["VERL_CPU_HOLD"]:  # in mid-step, for a test that interrupts the run
                await asyncio.sleep(3600)
        return TokenOutput(
            token_ids=tokens,
            log_probs=logprobs if sampling_params.get("logprobs") else None,
            stop_reason="completed" if ended else "length",
            extra_fields={"global_steps": self.step},
        )

    @torch.no_grad()
    def sample(self, prompt_ids: list[int], settings: dict[str, Any]) -> tuple[list[int], list[float], bool]:
        tokens: list[int] = []
        logprobs: list[float] = []
        question = f"{self.seed} {self.step} {prompt_ids}"
        self.asked[question] += 1
        generator = torch.Generator().manual_seed(zlib.crc32(f"{question} {self.asked[question]}".encode()))
        temperature = float(settings.get("temperature", 1.0))
        now, past = torch.tensor([prompt_ids]), None
        for _ in range(self.limit):
            out = self.model(input_ids=now, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[0, -1]
            logp = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
            drawn = torch.multinomial(logp.exp(), 1, generator=generator) if temperature > 0 else logp.argmax()
            tokens.append(int(drawn))
            logprobs.append(float(logp[tokens[-1]]))
            if tokens[-1] == self.eos:
                return tokens, logprobs, True
            now = torch.tensor([tokens[-1:]])
        return tokens, logprobs, False

    async def do_nothing(self, *_: Any, **__: Any) -> None: ...

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = do_nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = do_nothing

    async def set_global_steps(self, step: int) -> None:
        self.step = step


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        options = {"num_cpus": 0, "max_concurrency": self.max_concurrency, "name": server_name(self.replica_rank)}
        server = ray.remote(Server).options(**options)
        seed = int(self.config.seed) + self.replica_rank
        handle = server.remote(self.model_config.path, seed, int(self.config.response_length))
        self.servers, self._server_handle = [handle], handle
        self._server_address = server_name(self.replica_rank)


class Adapter(BaseRollout):
    """Lives in the actor's worker; hands the trained weights to its server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any = None, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True

    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        from verl.workers.rollout.utils import ensure_async_iterator

        copies = [(name, value.detach().cpu().clone()) async for name, value in ensure_async_iterator(weights)]
        await ray.get_actor(server_name(self.replica_rank)).load_weights.remote(copies, global_steps)


def server_name(rank: int) -> str:
    return f"{NAME}_server_{rank}_0"


base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
