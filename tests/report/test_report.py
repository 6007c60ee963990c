"""The report's data: what it says of a real run, of parts of one, of a very long one, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import random
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest

from tiny_training import command
from ups_rm.data.rows import read_rows
from ups_rm.durable import write_text
from ups_rm.errors import RunError
from ups_rm.report import page, read_run, write_report
from ups_rm.report.groups import Prompts, disagreement, read_groups
from ups_rm.report.numbers import histogram, short
from ups_rm.report.outcome import flips
from ups_rm.report.page import LARGEST, labels
from ups_rm.reward.scorer import RewardScorer
from ups_rm.tracking import SampleRecord, read_group_log, read_metrics
from ups_rm.tracking.group_log import SCHEMA
from ups_rm.types import Conversation

ASSETS = Path(__file__).resolve().parents[2] / "src/ups_rm/report/assets"


def payload(file: Path) -> dict[str, Any]:
    """The data of a page, as its script reads it."""
    found = re.search(r'id="payload">([A-Za-z0-9+/=]+)</script>', file.read_text(encoding="utf-8"))
    assert found
    return unpacked(found[1])


def unpacked(text: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(text)))  # type: ignore[no-any-return]


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """A run folder that may be changed; what the recipe names is not beside it."""
    return shutil.copytree(first, tmp_path / "moved")


# ---- a whole run


def test_a_run_ends_with_its_report(first: Path) -> None:
    data = payload(first / "report.html")
    [run] = data["runs"]
    summary = json.loads((first / "summary.json").read_text())
    assert run["outcome"]["score"]["after"] == pytest.approx(summary["safe_score"]["after"], rel=1e-4)
    assert [run["outcome"]["score"]["low"], run["outcome"]["score"]["high"]] == pytest.approx(
        summary["safe_score"]["ci95"], rel=1e-4
    )
    assert {row["key"] for row in run["outcome"]["rows"] if row["key"].count(".") < 2} == {
        "safe_score", "refusal_rate.unsafe", "refusal_rate.benign", "length", "distinct_2", "kl",
    }  # fmt: skip
    assert run["finished"]
    assert run["sources_kept"]
    assert run["problems"] == []
    assert run["reward_models"][0]["check"]["ok"] is True
    assert run["reward_models"][0]["curves"]["reliability"]
    assert run["data"]["report"]["read"]["rows"]["total"] == 1592
    assert run["made_with"]["engine"] == "local"
    assert {prompt["kind"] for prompt in run["prompts"]} == {"unsafe", "benign"}
    assert any(prompt["categories"] for prompt in run["prompts"])


def test_every_number_is_the_logs(first: Path) -> None:
    run = read_run(first)
    rows = read_metrics(first / "metrics.jsonl")
    assert run["metrics"]["steps"] == [row["step"] for row in rows]
    for name, values in run["metrics"]["series"].items():
        assert values == [short(row.get(name)) for row in rows], name
    for step in run["groups"]["steps"]:
        log = read_group_log(first / "groups" / f"step_{step['step']:06d}.jsonl")
        assert len(log.groups) == len(step["groups"])
        for group, shown in zip(log.groups, step["groups"], strict=True):
            assert run["prompts"][shown["prompt"]]["messages"] == list(group.messages)
            for sample, row in zip(group.samples, shown["samples"], strict=True):
                assert row["text"] == sample.response
                assert row["advantage"] == pytest.approx(sample.advantage, rel=1e-3, abs=1e-9)
    later = run["groups"]["steps"][-1]["groups"][0]["samples"][0]
    assert sum(later["token_kl"]) == pytest.approx(
        later["kl"],
        rel=0.05,
        abs=0.005 * len(later["token_kl"]) + 1e-3,  # each is rounded to two digits
    )
    assert sum(later["ends"]) == len(later["text"])
    pairs = [json.loads(line) for line in (first / "eval/pairs.jsonl").read_text().splitlines()]
    assert [pair["after"]["text"] for pair in run["outcome"]["pairs"]] == [pair["after"]["response"] for pair in pairs]


def test_categories_come_with_the_prompts_from_the_rows_to_every_figure(first: Path) -> None:
    flagged: dict[str, set[str]] = {}
    for row in read_rows("sample", split="test"):
        of_row = {name for names in row.categories for name in names or ()}
        flagged.setdefault(row.prompt.strip(), set()).update(of_row)
    lines = [json.loads(line) for line in (first / "eval/pairs.jsonl").read_text().splitlines()]
    for line in lines:
        assert set(line["categories"]) == flagged[line["messages"][-1]["content"].strip()]
    by_category: dict[str, set[int]] = {}
    for line in lines:
        for name in line["categories"] if line["kind"] == "unsafe" else ():
            by_category.setdefault(name, set()).add(line["index"])
    summary = json.loads((first / "summary.json").read_text())
    assert {name: row["n"] for name, row in summary["categories"].items()} == {
        n: len(p) for n, p in by_category.items()
    }
    assert len(by_category) >= 2
    logs = sorted((first / "groups").glob("step_*.jsonl"))
    logged = [group for file in logs for group in read_group_log(file).groups]
    assert any(group.categories for group in logged)
    (first_group,) = [group for group in logged if group.categories][:1]
    rows = {row["messages"][-1]["content"]: row["categories"] for row in read_run(first)["prompts"]}
    assert rows[first_group.messages[-1]["content"]] == first_group.categories


def test_a_run_ends_with_perplexity_language_and_the_second_judges_verdict(first: Path, second: Path) -> None:
    summary, judged = (json.loads((folder / "summary.json").read_text()) for folder in (first, second))
    for figures in summary["groups"].values():
        assert figures["perplexity"]["before"] > 1
        assert figures["perplexity"]["after"] > 1
        assert "language_kept" in figures
    assert summary["judges"] == {}
    assert list(judged["judges"]) == ["second-rm"]
    run = read_run(second)
    assert {"judges.second-rm.unsafe.safe_score", "judges.second-rm.benign.agrees_with_rm"} <= {
        row["key"] for row in run["outcome"]["rows"]
    }
    pairs = [json.loads(line) for line in (second / "eval/pairs.jsonl").read_text().splitlines()]
    for pair, shown in zip(pairs, run["outcome"]["pairs"], strict=True):
        own, other = (
            pair["after"]["safe_score"] - pair["before"]["safe_score"],
            pair["after"]["judges"]["second-rm"]["safe_score"] - pair["before"]["judges"]["second-rm"]["safe_score"],
        )
        assert shown["disagreement"] == pytest.approx(abs(own - other), abs=1e-3)
    assert {pair["disagreement"] for pair in read_run(first)["outcome"]["pairs"]} == {None}


def test_the_judge_of_the_steps_replies_stands_in_the_group_log(second: Path, rm_folder: Path) -> None:
    [log] = [read_group_log(second / "groups/step_000002.jsonl")]
    judge = RewardScorer.load(rm_folder)
    for group in log.groups[:2]:
        talks: list[Conversation] = [
            [*group.messages, {"role": "assistant", "content": sample.response}] for sample in group.samples
        ]
        for sample, score in zip(group.samples, judge.score(talks), strict=True):
            assert sample.model_logits["reward_model"] == sample.logit
            assert sample.model_logits["monitor.judge"] == pytest.approx(score.logit, abs=0.05)
    shown = read_run(second)["groups"]["steps"][1]["groups"]
    assert all(group["disagreement"] is not None for group in shown)
    assert len({group["disagreement"] for group in shown}) > 1
    assert command("groups", second, "--sort", "disagreement") == 0


def test_equal_runs_give_equal_bytes(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    made_by_the_run = Path("runs/first/report.html").read_bytes()
    assert write_report([Path("runs/first")], tmp_path / "again.html").read_bytes() == made_by_the_run


@pytest.mark.usefixtures("clean_environment")
def test_the_command_of_the_report_makes_the_same_run_again(
    workspace: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = (first / "groups/step_000001.jsonl").read_bytes()
    words = read_run(Path("runs/first"))["command"].split()
    assert words[:2] == ["ups-rm", "run"]
    assert command(*words[1:]) == 0
    again = workspace / "runs/first-again"
    old, new = (json.loads((folder / "eval/comparison.json").read_text()) for folder in (first, again))
    assert new == old
    for step in range(1, 5):
        name = f"groups/step_{step:06d}.jsonl"
        assert (again / name).read_bytes() == (first / name).read_bytes()
    assert (first / "groups/step_000001.jsonl").read_bytes() == before


# ---- parts of a run


def test_parts_that_are_absent_are_none_and_no_error(copied: Path, tmp_path: Path) -> None:
    for name in ("report_sources.json", "made_with.json", "summary.json"):
        (copied / name).unlink()
    for name in ("eval", "groups", "policy"):
        shutil.rmtree(copied / name)
    run = read_run(copied)
    assert run["outcome"] is None
    assert run["groups"]["steps"] == []
    assert run["alarms"] == []  # the monitor watched and raised none
    assert not run["finished"]
    assert run["problems"] == []
    (copied / "recipe.yaml").unlink()
    assert read_run(copied)["command"] == ""
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    unwatched = [{name: value for name, value in line.items() if not name.startswith("alarm/")} for line in lines]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unwatched))
    assert read_run(copied)["alarms"] is None
    (copied / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="is not a run folder"):
        write_report([copied], tmp_path / "x.html")


def test_what_cannot_be_read_is_said(copied: Path) -> None:
    write_text(copied / "groups/step_000002.jsonl", '{"schema": "another"}\n')
    write_text(copied / "eval/pairs.jsonl", '{"index": 1}\n')
    (copied / "alarms.jsonl").write_text('{"step": 3, "name": "kl_runaway", "value": 2.5, "threshold": 1}\nhalf a li')
    (copied / "recipe.yaml").write_text("trainer: {nonsense: 1}\n")
    run = read_run(copied)
    assert len(run["groups"]["steps"]) == 3
    assert run["alarms"] == [{"step": 3, "name": "kl_runaway", "value": 2.5, "threshold": 1, "message": ""}]
    said = "\n".join(run["problems"])
    for part in ("step_000002.jsonl", "pairs.jsonl:1", "alarms.jsonl:2", "nonsense"):
        assert part in said


def test_figures_that_a_later_version_adds_are_rows_too(copied: Path) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    summary["judges"] = {"second": {"safe_score": {"before": 0.5, "after": 0.25, "ci95": [-0.5, 0.0], "n": 7}}}
    summary["policies"] = {"before": "one", "after": "other"}  # as `ups-rm eval` says
    write_text(copied / "summary.json", json.dumps(summary))
    outcome = read_run(copied)["outcome"]
    assert "policies" not in {row["key"] for row in outcome["rows"]}
    assert {"key": "judges.second.safe_score", "before": 0.5, "after": 0.25, "low": -0.5, "high": 0, "n": 7} in outcome[
        "rows"
    ]


# ---- writing


def test_only_a_report_of_ours_is_replaced(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "notes.html"
    theirs.write_text("<html>mine</html>")
    with pytest.raises(RunError, match="is not a report of ours"):
        write_report([first], theirs)
    assert theirs.read_text() == "<html>mine</html>"
    ours = write_report([first], tmp_path / "new/report.html")
    before = ours.stat().st_ino
    assert write_report([first], ours).stat().st_ino != before  # renamed into place, not written over
    assert [file.name for file in ours.parent.iterdir()] == ["report.html"]
    monkeypatch.chdir(tmp_path)
    assert command("report", first, "--out", "notes.html") == 2
    assert command("report", tmp_path) == 2


def long_run(folder: Path, *, steps: int, groups: int, words: int) -> Path:
    """A run folder with metrics and groups such as a long training leaves, in texts of random words."""
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(5000)]

    def reply() -> dict[str, Any]:
        numbers = {name: chance.random() for name in ("logit", "safe_score", "reward", "advantage", "kl")}
        return numbers | {
            "response": " ".join(chance.choices(vocabulary, k=words)),
            "length": words,
            "truncated": False,
            "token_kl": [round(chance.random(), 3) for _ in range(words)],
            "token_ends": [7 * i + 6 for i in range(words)],
        }

    (folder / "groups").mkdir(parents=True)
    metrics = []
    for step in range(1, steps + 1):
        lines: list[dict[str, Any]] = [{"schema": SCHEMA, "step": step, "groups_total": groups}]
        for place in range(groups):
            text = f"{'why ' * 10}{(step + place) % 97}?"
            group = {"prompt_id": place, "messages": [{"role": "user", "content": text}], "kind": "unsafe", "n": 4}
            lines.append(group | {"samples": [reply() for _ in range(4)]})
        (folder / f"groups/step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics.append({"step": step, "time": 0.0} | {f"metric/{i}": chance.random() for i in range(70)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def test_a_thousand_steps_stay_under_five_megabytes(tmp_path: Path) -> None:
    """Of the size of the default recipe's; random words compress worse than any policy's."""
    run = long_run(tmp_path / "long", steps=1000, groups=2, words=30)
    file = write_report([run])
    assert 1_500_000 < file.stat().st_size <= LARGEST < 5_000_000
    [data] = payload(file)["runs"]
    assert len(data["metrics"]["steps"]) == 1000
    assert len(data["groups"]["steps"]) == 1000


def test_what_would_not_fit_is_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = long_run(tmp_path / "long", steps=150, groups=2, words=30)
    whole = write_report([run]).stat().st_size
    monkeypatch.setattr(page, "LARGEST", int(whole * 0.7))
    file = write_report([run])
    assert file.stat().st_size <= whole * 0.7
    [data] = payload(file)["runs"]
    kept = [step["step"] for step in data["groups"]["steps"]]
    assert (kept[0], kept[-1]) == (1, 150)
    assert 24 <= len(kept) < 150
    assert data["groups"]["steps_total"] == 150
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1


def test_of_large_steps_the_same_prompts_are_kept(tmp_path: Path) -> None:
    run = long_run(tmp_path / "wide", steps=30, groups=97, words=5)
    prompts = Prompts()
    total = sum(file.stat().st_size for file in (run / "groups").glob("step_*.jsonl"))
    found = read_groups(run / "groups", prompts, max_bytes=total // 10, problems=[])
    kept = [{group["prompt"] for group in step["groups"]} for step in found["steps"]]
    assert len(kept) == 24
    assert all(0 < len(step) < 30 for step in kept)
    assert found["groups_total"] == 24 * 97
    assert len(kept[0] & kept[-1]) >= len(kept[0]) - 1


# ---- numbers


def sample(**logits: float) -> SampleRecord:
    return SampleRecord("x", 0.0, 0.5, 0.0, 0.0, 0.0, 1, False, model_logits=logits)


def test_disagreement_is_the_share_of_pairs_ordered_the_other_way() -> None:
    alike = [sample(a=1.0, b=10.0), sample(a=2.0, b=20.0), sample(a=3.0, b=30.0)]
    turned = [sample(a=1.0, b=3.0), sample(a=2.0, b=2.0), sample(a=3.0, b=1.0)]
    one_pair = [sample(a=1.0, b=1.0), sample(a=2.0, b=3.0), sample(a=3.0, b=2.0)]
    tied = [sample(a=1.0, b=5.0), sample(a=2.0, b=5.0)]
    assert [disagreement(group) for group in (alike, turned, one_pair, tied)] == [0, 1, pytest.approx(1 / 3), 0.5]
    assert disagreement([sample(a=1.0), sample(a=2.0)]) is None
    assert disagreement(alike[:1]) is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.4, False), (0.6, False), ["unsafe_to_safe"]),
        ((0.6, True), (0.4, False), ["safe_to_unsafe", "refused_to_answered"]),
        ((0.4, False), (0.9, True), ["unsafe_to_safe", "answered_to_refused"]),
        ((0.5, True), (0.1, True), []),
    ],
)
def test_flips(before: tuple[float, bool], after: tuple[float, bool], expected: list[str]) -> None:
    assert flips(*({"score": score, "refusal": refusal} for score, refusal in (before, after))) == expected


def test_histograms_count_every_value() -> None:
    values = [0, 1, 1, 5, 300, 301, 100_000]
    found = histogram(values, bins=10)
    assert found is not None
    assert sum(found["counts"]) == len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert histogram([]) is None
    assert [short(value) for value in (float("nan"), float("inf"), True, 2, 1.0, 0.123456789)] == [
        None, None, None, 2, 1, 0.12346,
    ]  # fmt: skip


# ---- words


def test_every_word_of_the_page_is_in_the_table_in_both_languages() -> None:
    table = labels()
    scripts = "\n".join(file.read_text(encoding="utf-8") for file in ASSETS.glob("*.js"))
    used = set(re.findall(r'\bt\(\s*"([^"]+)"', scripts))
    assert len(used) > 60
    assert not used - table.keys()
    prefixes = tuple(set(re.findall(r"\b(?:t|known)\(`([a-z_]+)\$\{", scripts)))
    quoted = set(re.findall(r'"([a-z_]+)"', scripts))
    unused = [key for key in table if key not in used and not key.startswith(prefixes) and key not in quoted]
    assert not unused
    for key, words in table.items():
        assert set(words) == {"en", "zh"}, key
        holes = [sorted(re.findall(r"\{(\w+)\}", text)) for text in words.values()]
        assert holes[0] == holes[1], key
        assert (
            re.search(r"[a-z]", words["zh"]) is None or re.search(r"[一-鿿]", words["zh"]) or len(words["zh"]) < 15
        ), key
    literal = re.findall(r'h\("[a-z0-9]+", \{[^{}]*\}, "([^"]+)"', scripts)
    assert not literal, "words that are not in the table"


def test_the_plotting_library_comes_with_its_licence() -> None:
    assert "MIT License" in (ASSETS / "uplot/LICENSE").read_text()
    assert (
        (ASSETS / "uplot/uPlot.iife.min.js").read_text().startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32)")
    )
    for file in ASSETS.rglob("*.js"):
        assert "</script" not in file.read_text(encoding="utf-8").lower(), file
        assert "innerHTML" not in file.read_text(encoding="utf-8") or "uplot" in str(file), file
