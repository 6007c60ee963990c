"""`ups-rm groups`: sorting, filtering, searching, one prompt across steps, parquet; nothing steers the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev

import pytest

from tiny_training import command
from ups_rm.errors import DataError, RunError
from ups_rm.tracking import GroupLog, GroupRecord, SampleRecord
from ups_rm.tracking.group_table import SORTS, GroupRow, Query, read_groups, sorted_groups, write_parquet
from ups_rm.types import Message

SCORES = {  # (step, prompt id) -> safe scores of its replies
    (1, 7): [0.2, 0.4, 0.3], (1, 8): [0.1, 0.9, 0.5], (2, 7): [0.6, 0.7, 0.65], (2, 9): [0.5, 0.5, 0.5],
    (3, 7): [0.9, 0.8, 0.7], (3, 8): [0.3, 0.2, 0.1],
}  # fmt: skip
WORDS = {7: "Bake a Brot", 8: "Fix a tap", 9: "Say hello"}


def sample(score: float, text: str, **logits: float) -> SampleRecord:
    return SampleRecord(text, -math.log(score / (1 - score)), score, score, score - 0.5, 10 * score, 4, False, logits)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps; model b disagrees with model a on one pair of three in group (1, 8)."""
    log = GroupLog(tmp_path / "groups")
    for step in (1, 2, 3):
        groups = []
        for (at, prompt), scores in SCORES.items():
            if at == step:
                messages: list[Message] = [{"role": "user", "content": f"{WORDS[prompt]}?"}]
                b = [1.0, 3.0, 2.5] if (at, prompt) == (1, 7) else [1.0, 2.0, 3.0]
                samples = [
                    sample(s, f"reply {i} of {prompt}", a=s, b=b[i]) for i, s in enumerate(scores)
                ]  # fmt: skip
                kind, harms = "benign" if prompt == 9 else "unsafe", {7: ["Violence", "Drugs"], 8: ["Violence"]}
                groups.append(GroupRecord(prompt, messages, samples, kind, categories=harms.get(prompt, [])))
        log.write(step, groups)
    return tmp_path


def ids(rows: list[GroupRow]) -> list[tuple[int, int]]:
    return [(row.step, int(row.group.prompt_id)) for row in rows]


def test_sorting_is_that_of_the_definitions(run: Path) -> None:
    first = {7: mean(SCORES[1, 7]), 8: mean(SCORES[1, 8]), 9: mean(SCORES[2, 9])}
    by = {
        "spread": lambda key: stdev(SCORES[key]),
        "gain": lambda key: mean(SCORES[key]) - first[key[1]],
        "score": lambda key: mean(SCORES[key]),
        "kl": lambda key: 10 * mean(SCORES[key]),
        "step": lambda key: -key[0],
    }
    for name, value in by.items():
        for reverse in (False, True):
            found = ids(sorted_groups(run, Query(), by=name, reverse=reverse, limit=0))
            assert len(found) == 6
            got = [value(key) for key in found]  # type: ignore[arg-type]
            assert got == pytest.approx(sorted(got, reverse=not reverse)), name
            assert ids(sorted_groups(run, Query(), by=name, reverse=reverse, limit=2)) == found[:2]
    disagreement = {(row.step, row.group.prompt_id): row.disagreement for row in read_groups(run, Query())}
    assert disagreement[1, 7] == 0  # a: 0 < 2 < 1, b: 0 < 2 < 1
    assert disagreement[1, 8] == pytest.approx(1 / 3)  # a: 0 < 2 < 1, b: 0 < 1 < 2
    assert disagreement[3, 8] == 1  # a: 2 < 1 < 0, b: 0 < 1 < 2
    assert set(SORTS) == {*by, "disagreement", "length"}


def test_filters(run: Path) -> None:
    def found(**query: object) -> list[tuple[int, int]]:
        return ids(sorted_groups(run, Query(**query), by="step", limit=0))  # type: ignore[arg-type]

    assert found(steps=(2, 3)) == [(2, 7), (2, 9), (3, 7), (3, 8)]
    assert found(kind="benign") == [(2, 9)]
    assert found(category="violence") == found(kind="unsafe")
    assert found(category="drug") == [(1, 7), (2, 7), (3, 7)]
    assert found(category="Cybercrime") == []
    assert found(prompt_id="7") == [(1, 7), (2, 7), (3, 7)]
    assert found(search="bROT") == [(1, 7), (2, 7), (3, 7)]  # in the prompt
    assert found(search="REPLY 1 of 8") == [(1, 8), (3, 8)]  # in a reply
    assert found(search="nowhere") == []
    gains = [row.gain for row in sorted_groups(run, Query(steps=(3, 3), prompt_id="7"))]
    assert gains == [pytest.approx(0.5)]  # since step 1, which is not shown


def test_parquet_has_one_row_per_reply(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file = run / "out" / "groups.parquet"
    assert write_parquet(run, Query(kind="unsafe"), file) == 15
    table = pandas.read_parquet(file)
    assert len(table) == 15
    of_step = table[(table.step == 3) & (table.prompt_id == "7")]
    assert of_step.safe_score.tolist() == SCORES[3, 7]
    assert of_step.group_gain.tolist() == pytest.approx([0.5] * 3)
    assert of_step.response.tolist() == [f"reply {i} of 7" for i in range(3)]
    assert of_step.prompt.unique().tolist() == ["Bake a Brot?"]
    assert [list(names) for names in of_step.categories] == [["Violence", "Drugs"]] * 3
    assert dict(table.model_logits[0]) == {"a": 0.2, "b": 1.0}
    assert [path.name for path in file.parent.iterdir()] == ["groups.parquet"]
    with pytest.raises(RunError, match="nothing is overwritten"):
        write_parquet(run, Query(), file)


def test_what_cannot_be_sorted_or_found_says_why(run: Path, tmp_path: Path) -> None:
    GroupLog(tmp_path / "single").write(1, [GroupRecord(1, [{"role": "user", "content": "?"}], [sample(0.5, "x")])])
    assert ids(sorted_groups(tmp_path / "single", Query(), by="score")) == [(1, 1)]
    with pytest.raises(DataError, match="none of the 1 groups can be sorted by disagreement: that needs the logits"):
        sorted_groups(tmp_path / "single", Query(), by="disagreement")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="has no group log"):
        sorted_groups(tmp_path / "empty", Query())


def test_the_folder_that_the_recipe_names_is_found(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.yaml").write_text(f"trainer: {{group_log_dir: {run / 'groups'}}}")
    assert len(list(read_groups(elsewhere, Query()))) == 6


def test_the_command_shows_best_and_worst_and_escapes_what_models_write(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J[bold red]all\x07 yours[/]\r\u202eoverwritten"
    group = GroupRecord(11, [{"role": "user", "content": f"go {evil}"}], [sample(0.5, evil), sample(0.7, "second")])
    GroupLog(run / "groups").write(4, [group])
    assert command("groups", run, "--step", "last") == 0
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\r\u202e")
    assert r"\x1b[2J[bold red]all\x07 yours[/]\r\u202eoverwritten" in out
    assert out.index("second") < out.index("0.500")

    assert command("groups", run, "--prompt", "7", "--replies", "2") == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("step")] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    assert "gain +0.500" in out
    assert "2 of 3 replies" in out
    assert command("groups", run, "--category", "drugs", "--step", "2") == 0
    assert "step 2  prompt 7  unsafe  Violence, Drugs  score" in capsys.readouterr().out
    assert command("groups", run, "--search", "tap", "--sort", "gain", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["gain"]) for row in rows] == [(1, 0), (3, pytest.approx(-0.3))]
    assert len(rows[0]["group"]["samples"]) == 3
    file = run / "g.parquet"
    assert command("groups", run, "--step", "1-2", "--parquet", file) == 0
    assert f"12 replies: {file}" in capsys.readouterr().out
    for wrong, says in ((["--sort", "size"], "--sort size is not known"), (["--kind", "x"], "--kind x is not known"),
                        (["--step", "x"], "--step x is not a step")):  # fmt: skip
        assert command("groups", run, *wrong) == 2
        assert says in capsys.readouterr().err
