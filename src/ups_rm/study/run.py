"""Do what a study asks for and is not done: each cell is `ups-rm run` in its folder, and a done one is skipped."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from time import perf_counter

from ups_rm.console import console
from ups_rm.durable import write_text
from ups_rm.errors import RunError
from ups_rm.pipeline import run as run_all
from ups_rm.report import write_report
from ups_rm.study.picture import draw
from ups_rm.study.plan import Study
from ups_rm.study.results import ArmResult, arm_results, study_table, tables, to_markdown


def run_study(study: Study, out: Path, *, overrides: tuple[str, ...] = ()) -> list[ArmResult]:
    """Every cell, then `study.json`, `study.md` and `pareto.png` in `out`, which are written anew after each cell, and
    at the end `report.html`.

    Args:
        out: run folders are `<out>/<arm>/seed-<seed>`; a study that was interrupted goes on.
        overrides: `key=value` of all arms, after those of the study.

    Raises:
        UpsRmError: of the cell that can't go on. Interrupted, Stopped: the same call goes on.
        RunError: `out` holds a study of other arms.
    """
    cells = study.cells(overrides)
    recipes = [study.load(cell, out) for cell in cells]  # what is wrong with the last one is said before the first
    _claim(study, out, overrides)
    started, done = perf_counter(), 0
    results: list[ArmResult] = []
    for number, (cell, recipe) in enumerate(zip(cells, recipes, strict=True), start=1):
        left = len(cells) - number + 1
        eta = f", about {(perf_counter() - started) / done * left / 60:.0f} minutes left" if done else ""
        console.rule(f"[bold]{cell.arm}, seed {cell.seed} ({number} of {len(cells)}{eta})")
        before = (cell.folder(out) / "summary.json").is_file()
        run_all(recipe)
        done += not before
        results = arm_results(study, out)
        _write(results, out)
    console.print(study_table(results))
    page = _report(results, out)
    console.print(f"table: {out / 'study.md'}   picture: {out / 'pareto.png'}   report: {page}", soft_wrap=True)
    return results


def _claim(study: Study, out: Path, overrides: tuple[str, ...]) -> None:
    """Note what the folder is for.

    Raises:
        RunError: it is for something else.
    """
    wanted = {
        "recipe": study.recipe, "overrides": [*study.overrides, *overrides], "arms": study.arms, "seeds": study.seeds,
    }  # fmt: skip
    file = out / "plan.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} can't be read: {error}\n  fix: another --out") from error
        # more seeds and more arms may be added to what is there
        kept = {**found, "seeds": study.seeds, "arms": study.arms}
        same_arms = all(study.arms.get(arm, own) == own for arm, own in found["arms"].items())
        if not same_arms or kept != wanted:
            raise RunError(f"{out} holds a study with other settings: nothing is overwritten\n  fix: another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")


def _write(results: list[ArmResult], out: Path) -> None:
    rows = [result.to_dict() for result in results]
    write_text(out / "study.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "study.md", to_markdown(results))
    draw(results, out / "pareto.png")


def _report(results: list[ArmResult], out: Path) -> Path:
    """The study's tables and picture, with the first training of each arm to look into."""
    picture = base64.b64encode((out / "pareto.png").read_bytes()).decode()
    study = {"tables": tables(results), "picture": f"data:image/png;base64,{picture}"}
    runs = [out / result.arm / f"seed-{result.seeds[0]}" for result in results]
    return write_report(runs, out / "report.html", study=study)
