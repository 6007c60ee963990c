"""`ups-rm export`: a checkpoint of verl's as a Hugging Face folder that plain transformers loads.

verl's own model merger joins the shards (in bfloat16); adapters are merged into the weights, as the local engine does.
The merger reads its shards by pickle: export only checkpoints that you trust, which your own are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ups_rm.errors import CheckpointError, RunError


def export_policy(checkpoint: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the policy of `checkpoint` (a folder `global_step_N`) to `out`, which is replaced as a whole.

    Raises:
        CheckpointError: no checkpoint of verl's there. RunError: verl's merger failed.
    """
    actor = checkpoint / "actor"
    if not (actor / "fsdp_config.json").is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint of the verl engine: it has no actor/fsdp_config.json")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor.absolute()), "--target_dir", str(temporary.absolute())]
    if trust_remote_code:
        command.append("--trust-remote-code")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HYDRA_FULL_ERROR": "1"})
    if done.returncode != 0:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"verl's model merger failed on {actor}:\n{done.stderr[-2000:]}")
    if (temporary / "lora_adapter").is_dir():
        _merge_adapter(temporary, trust_remote_code)
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)
    return out


def _merge_adapter(folder: Path, trust_remote_code: bool) -> None:
    """Add the adapter that verl's merger laid beside the base weights to them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    merged = PeftModel.from_pretrained(base, str(folder / "lora_adapter")).merge_and_unload()
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    merged.to(torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(folder / "lora_adapter")
