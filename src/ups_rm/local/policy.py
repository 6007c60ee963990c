"""A causal language model to be trained: compute copy, fp32 master weights, optional LoRA, tokenizer.

Forward and backward run in the compute dtype (bf16 where the machine has it). The optimizer works on fp32 masters that
are copied back after each step: an update of 1e-6 would round away in bf16. With fp32 compute the parameters are their
own masters. With LoRA only the adapters are trained, in fp32, and the frozen base is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import PolicyError
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.sequences import Sequences
from ups_rm.local.shared_prefix import SharedPrefixForward
from ups_rm.model_files import check_manifest, check_model_folder, panics_as_errors, refused_pickle
from ups_rm.models import resolve_model
from ups_rm.recipe import Model, Recipe


class Policy:
    """The model that is trained (or a frozen reference), with the tokenizer it came with.

    Attributes:
        model: the transformers (or peft) model in the compute dtype.
        masters: (parameter, fp32 master) per trainable parameter; the same tensor twice where compute is fp32.
    """

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, *, source: str = "", trust_remote_code: bool = False
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.source, self.trust_remote_code = source, trust_remote_code
        self.masters: list[tuple[Tensor, Tensor]] = []
        self.is_lora = hasattr(model, "peft_config")
        self.shared = SharedPrefixForward.of(model)

    @classmethod
    def load(cls, recipe: Recipe, *, trainable: bool = True, path: str | None = None) -> Policy:
        """Load `actor_rollout_ref.model` (or the folder `path`), with adapters and masters if `trainable`.

        Raises:
            PolicyError: no such model, not a causal LM, no chat template, no end token.
        """
        settings = recipe.actor_rollout_ref.model
        device = torch_device(recipe.trainer.device)
        dtype = compute_dtype(recipe.actor_rollout_ref.actor.fsdp_config.dtype, device)
        source = resolve_model(path or settings.path)
        lora = trainable and settings.lora_rank > 0
        # masters are the stored weights, not their bf16 rounding; a frozen base needs no masters
        first = torch.float32 if trainable and not lora else dtype
        model, tokenizer = load_model(source, dtype=first, trust_remote_code=settings.trust_remote_code)
        model.to(device)
        if trainable and settings.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            model = with_lora(model, settings, recipe.trainer.seed)
        model.eval()  # no dropout: the ratio of a fresh rollout must be exactly 1
        policy = cls(model, tokenizer, device, source=source, trust_remote_code=settings.trust_remote_code)
        if trainable:
            policy.make_masters(dtype)
        else:
            model.requires_grad_(False)
        return policy

    def make_masters(self, dtype: torch.dtype) -> None:
        """fp32 masters of the trainable parameters; without LoRA the model is lowered to the compute dtype.

        A parameter that stays fp32 (fp32 compute, adapters) is its own master.
        """
        self.masters = []
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            if self.is_lora or dtype == torch.float32:
                self.masters.append((parameter, parameter))
                continue
            master = parameter.detach().float().clone().requires_grad_(True)
            parameter.data = parameter.data.to(dtype)
            self.masters.append((parameter, master))

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end a reply: the generation config's and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        ids = {int(i) for i in [*listed, self.tokenizer.eos_token_id] if i is not None}
        return sorted(ids)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_ids[0])

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within: the adapters are off, so the model is the frozen base (LoRA only)."""
        with self.model.disable_adapter() if self.is_lora else nullcontext():
            yield

    def response_logprobs(
        self, part: Sequences, temperature: float, with_entropy: bool = False, kept: KeptForward | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each response token given all before it, by the shared-prefix forward where it applies.

        Args:
            part: a micro batch of b rows, R response columns.
            temperature: logits are divided by it, as in the rollout (verl does the same).
            kept: see `SharedPrefixForward.response_logprobs`; not with an entropy.

        Returns:
            logprobs (b, R) fp32, and the entropy (b, R) in nats if asked. Values at padding are meaningless.
        """
        if self.shared is None or with_entropy:
            return self.plain_logprobs(part, temperature, with_entropy)
        prompts, prompt_mask, group = part.unique_prompts()
        return self.shared.response_logprobs(
            prompts, prompt_mask, part.responses, part.response_mask, group, temperature, kept
        ), None

    def plain_logprobs(
        self, part: Sequences, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The same through transformers' own forward, for any causal LM; the fast path is tested against it."""
        ids = torch.cat([part.prompts, part.responses], dim=1)  # (b, T + R)
        mask = torch.cat([part.prompt_mask, part.response_mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        length = part.responses.shape[1]
        with self._checkpointing():
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=length + 1
            ).logits[:, -length - 1 : -1]  # (b, R, V); the last position predicts a token that is not there
        logits = logits.float() / temperature
        flat = F.cross_entropy(logits.flatten(0, 1), part.responses.flatten(), reduction="none")
        entropy = None
        if with_entropy:
            logp = logits.log_softmax(dim=-1)
            entropy = -(logp.exp() * logp).sum(dim=-1)
        return -flat.view_as(part.responses), entropy

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Within: layers checkpoint if the recipe asks for it. transformers does so in training mode only, which is
        switched on for the layers themselves and not for what is in them: dropout stays off."""
        base = self.model.get_base_model() if self.is_lora else self.model
        wanted = base.is_gradient_checkpointing and torch.is_grad_enabled()
        layers = [m for m in base.modules() if wanted and getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @torch.no_grad()
    def _merged(self) -> Any:
        """The stored base in fp32 with the adapters' deltas added: nothing is rounded to the compute dtype."""
        merged, _ = load_model(self.source, dtype=torch.float32, trust_remote_code=self.trust_remote_code)
        for name, module in self.model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None):
                for adapter in module.active_adapters:
                    merged.get_submodule(name).weight += module.get_delta_weight(adapter).float().cpu()
        return merged

    def save(self, folder: Path) -> None:
        """A Hugging Face folder that plain transformers loads; adapters merged, weights as trained (fp32 masters)."""
        model = self.model
        if self.is_lora:
            model = self._merged()
            state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        else:
            masters = {id(parameter): master for parameter, master in self.masters}
            state = {
                name: masters.get(id(tensor), tensor).detach().cpu()
                for name, tensor in model.state_dict(keep_vars=True).items()
            }
        model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        if any(tensor.dtype == torch.float32 for tensor in state.values()):
            _set_saved_dtype(folder, "float32")


def load_model(source: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal LM, checked for what a chat rollout needs.

    Raises:
        PolicyError: with the reason that transformers gave, or what is missing.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    check_model_folder(source, PolicyError, trust_remote_code=trust_remote_code)
    check_manifest(source, PolicyError)
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = refused_pickle(error) or said
        raise PolicyError(f"policy {source} can't be loaded as a causal language model: {reason}") from error
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise PolicyError(
            f"policy {source} can't be loaded as a causal language model: {len(lacking)} weights are not in the folder "
            f"or have another shape and would be random: {', '.join(lacking[:3])}, ..."
        )
    if not tokenizer.chat_template:
        raise PolicyError(
            f"policy {source} has no chat template\n"
            "  fix: use an instruction-tuned model or add chat_template.jinja to its folder"
        )
    if tokenizer.eos_token_id is None and model.generation_config.eos_token_id is None:
        raise PolicyError(f"policy {source} names no end token: replies would never end")
    return model, tokenizer


def needs_reference(recipe: Recipe) -> bool:
    """Whether the recipe uses or watches the KL to the frozen policy."""
    algorithm = recipe.algorithm
    in_reward = algorithm.use_kl_in_reward and (algorithm.kl_ctrl.kl_coef > 0 or algorithm.kl_ctrl.type == "adaptive")
    return in_reward or recipe.actor_rollout_ref.actor.use_kl_loss or recipe.trainer.max_kl > 0


def with_lora(model: Any, settings: Model, seed: int) -> Any:
    """The model with fp32 LoRA adapters (peft) that start as nothing; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    modules = settings.target_modules
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=modules if isinstance(modules, str) else list(modules),
        exclude_modules=settings.exclude_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # the adapters' A matrices are drawn here
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    if settings.enable_gradient_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


def _set_saved_dtype(folder: Path, dtype: str) -> None:
    import json

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
