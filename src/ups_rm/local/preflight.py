"""What is looked at before the policy is even loaded."""

from __future__ import annotations

from pathlib import Path

from ups_rm.console import console
from ups_rm.device import torch_device
from ups_rm.errors import RMError
from ups_rm.recipe import Recipe


def check_before_training(recipe: Recipe, *, skip: bool = False) -> None:
    """An RM that fails its check stops the run.

    Raises:
        RMError: an RM fails its check and `skip` is not set.
    """
    from ups_rm.reward.doctor import check_rm
    from ups_rm.reward.open import (
        EXAMINED,
        entry_names,
        kind_of,
        open_entry,
        open_helpfulness,
        probe,
        probe_numbers,
        template_of,
    )

    folder, entries = Path(recipe.trainer.default_local_dir), recipe.reward_model.entries()
    if skip:
        console.print("[bold red]the RM is not checked (--skip-rm-check)[/]")
        folder.mkdir(parents=True, exist_ok=True)
        names = ", ".join(entry.path or entry.url or entry.callable for entry in entries)
        (folder / "rm_check_skipped.txt").write_text(f"{names}: not checked (--skip-rm-check)\n", encoding="utf-8")
        return
    device = str(torch_device(recipe.trainer.device))
    for name, entry in zip(entry_names(entries), entries, strict=True):  # none: `load_scorer` says what is missing
        kind = kind_of(entry)
        if kind not in EXAMINED:
            probe(open_entry(entry, device, recipe.reward_model.max_batch_tokens), name)
            continue
        report = check_rm(
            entry.path,
            device=device,
            dtype=entry.dtype,
            kind=kind,
            output=entry.output,
            trust_remote_code=entry.trust_remote_code,
            chat_template=template_of(entry),
        )
        failed = [check for check in report.checks if check.verdict == "fail"]
        if failed:
            reasons = "\n".join(f"  {check.name}: {check.finding}" for check in failed)
            more = "" if entry.output == "unsafety" else f" --output {entry.output}"
            raise RMError(
                f"{entry.path} fails its check; nothing was trained\n{reasons}\n"
                f"  fix: ups-rm rm check {entry.path}{more}, or --skip-rm-check"
            )
    helpful = recipe.reward_model.helpfulness
    if helpful.named:
        model = open_helpfulness(helpful, device, recipe.reward_model.max_batch_tokens)
        probe_numbers(model.numbers, f"reward_model.helpfulness {model.name}")
