"""`ups-rm study`: what its file may say, what is run and what is skipped, and what the table and the picture hold."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from tiny_training import command
from ups_rm.errors import RecipeError, RunError
from ups_rm.evaluation.bootstrap import crossed_bootstrap, paired_bootstrap
from ups_rm.recipe import Recipe, load_recipe
from ups_rm.study import arm_results, read_study, run_study
from ups_rm.study.results import to_markdown

FILE = """
recipe: quickstart
overrides: [trainer.total_training_steps=2]
arms:
  safety: []
  constrained:
    - algorithm.objective=constrained
    - reward_training.target=both
seeds: [3, 5]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(FILE, encoding="utf-8")
    return tmp_path / "mine.yaml"


def leaves(folder: Path, gain: float, *, seed: int, helpful: bool = True) -> None:
    """What `ups-rm run` leaves: 6 unsafe and 4 harmless prompts with two replies each."""
    rng = random.Random(seed)
    rows = []
    for index in range(10):
        kind = "unsafe" if index < 6 else "benign"
        for _ in range(2):
            before = {
                "safe_score": rng.random() / 2,
                "refusal": False,
                "helpfulness": rng.random() if helpful else None,
            }
            after = {
                "safe_score": before["safe_score"] + gain,
                "refusal": index == 9 and gain > 0.2,
                "helpfulness": before["helpfulness"] - 1.0 if helpful else None,  # type: ignore[operator]
            }
            rows.append({"index": index, "kind": kind, "before": before, "after": after})
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"kl": 0.1, "distinct_2": {"before": 0.8, "after": 0.6}}))
    metrics = {"objective/lambda": 2.0 + seed} if helpful else {}
    (folder / "train_result.json").write_text(json.dumps({"steps": 2, "metrics": metrics}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "reward/mean": 0.5}) + "\n")


# ---- the file


def test_the_grid_is_seed_by_seed_and_each_cell_is_a_recipe_of_its_own(file: Path, tmp_path: Path) -> None:
    study = read_study(str(file))
    cells = study.cells(("data.train_batch_size=8",))
    assert [(cell.arm, cell.seed) for cell in cells] == [
        ("safety", 3), ("constrained", 3), ("safety", 5), ("constrained", 5),
    ]  # fmt: skip
    recipes = [study.load(cell, tmp_path) for cell in cells]
    assert [recipe.algorithm.objective for recipe in recipes] == ["safety", "constrained"] * 2
    assert [recipe.actor_rollout_ref.rollout.seed for recipe in recipes] == [3, 3, 5, 5]
    assert {recipe.trainer.total_training_steps for recipe in recipes} == {2}
    assert len({recipe.trainer.default_local_dir for recipe in recipes}) == 4


def test_the_packaged_studies_are_some(tmp_path: Path) -> None:
    for name, arms in (("study_constrained", ["original"]), ("study_own_rows", [])):
        study = read_study(name)
        assert list(study.arms) == ["safety", "weighted", "constrained", *arms]
        assert len(study.seeds) >= 3
        assert all(study.load(cell, tmp_path).reward_training.target == "both" for cell in study.cells())


def test_the_recommended_recipe_is_what_the_study_measured(tmp_path: Path) -> None:
    study = read_study("study_constrained")
    [cell] = [cell for cell in study.cells() if cell.arm == "constrained" and cell.seed == 0]
    measured, recommended = study.load(cell, tmp_path).as_dict(), load_recipe("constrained").as_dict()
    assert recommended["algorithm"] == measured["algorithm"]
    assert recommended["reward_training"] == measured["reward_training"]
    assert recommended["data"] | {"seed": 0} == measured["data"]
    assert recommended["actor_rollout_ref"]["actor"] == measured["actor_rollout_ref"]["actor"]
    assert recommended["trainer"]["total_training_steps"] == measured["trainer"]["total_training_steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "is not a study"),
        ("recipe: quickstart\narms: {a: []}\nseeds: []", "seeds is missing or empty"),
        ("recipe: quickstart\narms: [a]\nseeds: [1]", "arms is a list, expected a section"),
        ("recipe: quickstart\narms: {a: x=1}\nseeds: [1]", "arms.a is a text, expected a list of key=value"),
        ("recipe: quickstart\narms: {../a: []}\nseeds: [1]", "it names a folder"),
        ("recipe: quickstart\narms: {a: []}\nseeds: [1, 1]", "must be different whole numbers"),
        ("recipe: quickstart\narms: {a: []}\nseeds: [true]", "must be different whole numbers"),
        ("recipe: quickstart\narm: {a: []}\nseeds: [1]", "arm is not a key of a study"),
        ("recipe: quickstart\narms: {a: [algorithm.objectiv=x]}\nseeds: [1]", "arm a: algorithm.objectiv is not a key"),
        ("recipe: [", "can't be read as YAML"),
    ],
)
def test_a_file_that_is_wrong_names_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_study(str(tmp_path / "wrong.yaml"))
    assert message in str(error.value)
    with pytest.raises(RecipeError, match="packaged ones: study_constrained"):
        read_study("quickstart")


# ---- running


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of training, each run leaves files of a gain that its objective decides; the order is kept."""
    order: list[str] = []

    def run(recipe: Recipe) -> None:
        folder = Path(recipe.trainer.default_local_dir)
        order.append(f"{folder.parent.name}/{folder.name}")
        if not (folder / "summary.json").is_file():
            gain = 0.3 if recipe.algorithm.objective == "safety" else 0.1
            leaves(folder, gain, seed=recipe.data.seed)

    monkeypatch.setattr("ups_rm.study.run.run_all", run)
    return order


def test_a_study_leaves_a_table_and_a_picture_and_goes_on(file: Path, tmp_path: Path, trained: list[str]) -> None:
    out = tmp_path / "out"
    results = run_study(read_study(str(file)), out)
    assert [result.arm for result in results] == ["safety", "constrained"]
    assert trained == ["safety/seed-3", "constrained/seed-3", "safety/seed-5", "constrained/seed-5"]
    assert results[0].safe_score.interval.diff == pytest.approx(0.3)
    assert results[0].benign_refusals.interval.diff == pytest.approx(0.25)
    assert results[1].benign_refusals.after == 0.0
    assert results[1].multiplier is not None
    assert results[1].multiplier.mean == pytest.approx(2.0 + (3 + 5) / 2)
    assert results[1].multiplier.per_seed == [2.0 + 3, 2.0 + 5]
    assert results[1].distinct_2.mean == pytest.approx(0.75)
    assert results[0].against_first is None
    less = results[1].against_first
    assert less is not None
    assert less.safe_score.interval.diff == pytest.approx(0.1 - 0.3)  # the replies before are the same
    assert less.benign_refusals.interval.diff == pytest.approx(-0.25)
    assert less.helpfulness is not None
    assert less.helpfulness.interval.diff == pytest.approx(0.0)
    table = (out / "study.md").read_text(encoding="utf-8")
    assert "| constrained (2) | +0.100 [+0.100, +0.100] | +0.0 points [+0.0, +0.0] | -1.00 [-1.00, -1.00] |" in table
    assert "After training, less `safety`:\n\n| arm | safe score, unsafe prompts |" in table
    assert "| constrained | -0.200 [-0.200, -0.200] | -25.0 points [" in table
    assert image.imread(out / "pareto.png").shape[:2] > (300, 800)
    page = (out / "report.html").read_text(encoding="utf-8")
    packed = re.search(r'id="payload">([^<]+)<', page)
    assert packed is not None
    content = json.loads(gzip.decompress(base64.b64decode(packed.group(1))))
    assert [run["name"] for run in content["runs"]] == ["safety/seed-3", "constrained/seed-3"]
    study = content["study"]
    assert study["tables"][1]["rows"][0][:2] == ["constrained", "-0.200 [-0.200, -0.200]"]
    assert study["picture"].startswith("data:image/png;base64,")
    # a third seed later: what is done stays, and the new one joins
    (tmp_path / "mine.yaml").write_text(FILE.replace("[3, 5]", "[3, 5, 8]"), encoding="utf-8")
    assert run_study(read_study(str(file)), out)[0].seeds == [3, 5, 8]
    (tmp_path / "mine.yaml").write_text(FILE.replace("steps=2", "steps=4"), encoding="utf-8")
    with pytest.raises(RunError, match="holds a study with other settings"):
        run_study(read_study(str(file)), out)


def test_results_so_far_are_written_before_a_cell_fails(
    file: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ups_rm.study.run

    honest = ups_rm.study.run.run_all

    def fails_third(recipe: Recipe) -> None:
        if len(trained) == 2:
            raise RunError("the disk is full")
        honest(recipe)

    monkeypatch.setattr("ups_rm.study.run.run_all", fails_third)
    with pytest.raises(RunError, match="the disk is full"):
        run_study(read_study(str(file)), tmp_path / "out")
    rows = json.loads((tmp_path / "out/study.json").read_text())
    assert [row["seeds"] for row in rows] == [[3], [3]]


def test_without_a_helpfulness_model_the_columns_say_so(file: Path, tmp_path: Path) -> None:
    for seed in (3, 5):
        leaves(tmp_path / f"out/safety/seed-{seed}", 0.2, seed=seed, helpful=False)
    results = arm_results(read_study(str(file)), tmp_path / "out")
    assert len(results) == 1
    assert results[0].helpfulness is None
    assert "| - | - | 0.100 | 75% | - |" in to_markdown(results)
    (tmp_path / "out/safety/seed-3/eval/pairs.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"seed-3/eval/pairs\.jsonl can't be read"):
        arm_results(read_study(str(file)), tmp_path / "out")


@pytest.mark.slow
def test_the_command_trains_compares_and_skips_what_is_done(
    tmp_path: Path, policy_folder: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The real thing with tiny models: two arms, two seeds, one reward model with two heads for all."""
    monkeypatch.chdir(tmp_path)
    study: dict[str, Any] = {
        "overrides": [
            f"actor_rollout_ref.model.path={policy_folder}", f"reward_training.backbone={backbone_folder}",
            "reward_training.target=both", "trainer.total_training_steps=2", "trainer.device=cpu",
            "data.max_response_length=8", "evaluation.max_unsafe_prompts=4", "evaluation.max_benign_prompts=4",
            "evaluation.max_new_tokens=8",
        ],
    }  # fmt: skip
    Path("mine.yaml").write_text(FILE.replace("[trainer.total_training_steps=2]", json.dumps(study["overrides"])))
    assert command("study", "mine.yaml", "--out", "out") == 0
    first = capsys.readouterr().out
    assert first.count("features: done before") == 3, "what arms share is made once"
    rows = json.loads(Path("out/study.json").read_text())
    assert [(row["arm"], row["seeds"]) for row in rows] == [("safety", [3, 5]), ("constrained", [3, 5])]
    assert rows[1]["multiplier"] is not None
    assert rows[0]["helpfulness"] is not None, "the same model judges every arm"
    assert command("study", "mine.yaml", "--out", "out") == 0
    assert capsys.readouterr().out.count("train: done before") == 4


# ---- the interval


def test_one_seed_is_the_paired_bootstrap_and_seeds_that_differ_widen_it() -> None:
    rng = np.random.default_rng(0)
    after = rng.normal(0.1, 0.2, size=60)
    one = crossed_bootstrap([after.tolist()])
    plain = paired_bootstrap([0.0] * 60, after.tolist())
    assert (one.diff, one.n) == (pytest.approx(plain.diff), 60)
    assert (one.low, one.high) == (pytest.approx(plain.low, abs=0.004), pytest.approx(plain.high, abs=0.004))
    seeds = [after + shift for shift in (-0.2, 0.0, 0.2)]
    wide = crossed_bootstrap([row.tolist() for row in seeds])
    assert wide.high - wide.low > 2 * (one.high - one.low)
    with pytest.raises(ValueError, match="same prompts"):
        crossed_bootstrap([[1.0], [1.0, 2.0]])
