"""What is looked at before the policy is even loaded."""

from __future__ import annotations

from pathlib import Path

from ups_rm.console import console
from ups_rm.device import torch_device
from ups_rm.errors import RMError
from ups_rm.recipe import Recipe
from ups_rm.reward.doctor.report import CheckReport


def check_before_training(recipe: Recipe, *, skip: bool = False) -> None:
    """An RM that fails its check stops the run.

    Raises:
        RMError: an RM fails its check and `skip` is not set.
    """
    from ups_rm.reward.doctor.entries import check_entries, check_helpfulness

    folder, entries = Path(recipe.trainer.default_local_dir), recipe.reward_model.entries()
    if skip:
        console.print("[bold red]the RM is not checked (--skip-rm-check)[/]")
        folder.mkdir(parents=True, exist_ok=True)
        names = ", ".join(entry.path or entry.url or entry.callable for entry in entries)
        (folder / "rm_check_skipped.txt").write_text(f"{names}: not checked (--skip-rm-check)\n", encoding="utf-8")
        return
    device = str(torch_device(recipe.trainer.device))
    # no entry: `load_scorer` says what is missing
    for _, entry, report in check_entries(recipe.reward_model, device):
        more = "" if entry.output == "unsafety" else f" --output {entry.output}"
        more += " --kind pairwise" if entry.kind == "pairwise" else ""
        _refuse(report, f"ups-rm rm check {report.folder}{more}, or --skip-rm-check")
    helpful = check_helpfulness(recipe.reward_model, device)
    if helpful is not None:
        _refuse(helpful, "another reward_model.helpfulness, or --skip-rm-check")


def _refuse(report: CheckReport, way_out: str) -> None:
    """Shows the report's warnings.

    Raises:
        RMError: a check failed.
    """
    for check in report.of("warn"):
        console.print(f"{report.folder}: {check.name}: {check.finding}", style="yellow", markup=False)
    failed = report.of("fail")
    if failed:
        reasons = "\n".join(f"  {check.name}: {check.finding}" for check in failed)
        raise RMError(f"{report.folder} fails its check; nothing was trained\n{reasons}\n  fix: {way_out}")
