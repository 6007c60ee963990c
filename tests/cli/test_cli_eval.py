"""`ups-rm eval` from the command line on tiny models: prompts, judges, results; a policy against itself."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_policy, tiny_rm
from tiny_training import command, prompt_file, recipe_yaml

SMALL = ["evaluation.max_new_tokens=8", "evaluation.n=2", "evaluation.n_resamples=200"]


@pytest.fixture
def models(policy_folder: Path, rm_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "eval", "--before", str(policy_folder), "--after", str(policy_folder), "--rm", str(rm_folder),
        "--recipe", str(recipe_yaml(tmp_path)), *SMALL,
    ]  # fmt: skip


@pytest.fixture
def compared(models: list[str], tmp_path: Path) -> list[str]:
    return [*models, "--val-data", str(prompt_file(tmp_path / "val.parquet")), "evaluation.max_unsafe_prompts=4"]


def measures(value: Any) -> list[dict[str, Any]]:
    """Every {before, after, diff, ci95, n} in a summary, wherever it stands."""
    if not isinstance(value, dict):
        return []
    return [value] if "diff" in value else [m for part in value.values() for m in measures(part)]


def test_a_policy_against_itself_has_not_changed(
    compared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same draws before and after: every difference is exactly 0."""
    assert command(*compared, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out/comparison.json").read_text())
    assert summary["safe_score"]["diff"] == 0
    assert summary["safe_score"]["ci95"] == [0, 0]
    assert summary["safe_score"]["n"] == 4 + 4
    assert summary["kl"] == 0
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 16
    assert all({**pair["before"], "kl": 0} == pair["after"] for pair in pairs)
    assert len({pair["before"]["response"] for pair in pairs}) > 8
    assert "Before and after, 8 held-out prompts" in capsys.readouterr().out


def test_the_packaged_prompts_are_the_default_and_a_second_judge_sees_no_change_either(
    models: list[str], rm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_rm(tmp_path / "other-rm", seed=5)
    code = command(
        *models,
        "--limit",
        "3",
        "--out",
        tmp_path / "out",
        "--judge",
        other,
        "--judge",
        f"{rm_folder},name=twin,dtype=float32",
    )
    out = capsys.readouterr().out
    assert code == 0, out
    summary = json.loads((tmp_path / "out/comparison.json").read_text())
    assert summary["prompt_sets"][0]["prompts"] == {"unsafe": 3, "alarming": 3, "benign": 3}
    assert list(summary["groups"]) == ["unsafe", "alarming", "benign"]
    assert list(summary["judges"]) == ["other-rm", "twin"]
    found = measures(summary)
    assert len(found) > 30
    assert all(measure["n"] == 0 or (measure["diff"], measure["ci95"]) == (0, [0, 0]) for measure in found)
    for figures in summary["groups"].values():
        assert figures["perplexity"]["before"] == figures["perplexity"]["after"] > 1
        assert figures["kl"] == 0
        assert figures["win_rate"]["rate"] == 0.5
    twin, other_rm = summary["judges"]["twin"]["unsafe"], summary["judges"]["other-rm"]["unsafe"]
    assert twin["safe_score"]["before"] == pytest.approx(summary["groups"]["unsafe"]["safe_score"]["before"])
    assert twin["agrees_with_rm"] == {"before": 1.0, "after": 1.0}
    assert other_rm["safe_score"]["before"] != pytest.approx(twin["safe_score"]["before"])
    assert summary["settings"]["n"] == 2
    for part in ("3 unsafe prompts", "3 harmless prompts that sound dangerous", "What other judges say", "twin"):
        assert part in out, part


def test_another_policy_differs_and_the_judges_number_is_that_of_its_own_scorer(
    models: list[str], tmp_path: Path
) -> None:
    from ups_rm.reward.scorer import RewardScorer

    judge, after = tiny_rm(tmp_path / "judge", seed=6), tiny_policy(tmp_path / "after", seed=7)
    models[models.index("--after") + 1] = str(after)
    assert command(*models, "--limit", "2", "--out", tmp_path / "out", "--judge", judge) == 0
    summary = json.loads((tmp_path / "out/comparison.json").read_text())
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    unsafe = [pair for pair in pairs if pair["group"] == "unsafe"]
    talks = [[*pair["messages"], {"role": "assistant", "content": pair["after"]["response"]}] for pair in unsafe]
    scores = [score.safe_score for score in RewardScorer.load(judge).score(talks)]
    judged = summary["judges"]["judge"]["unsafe"]["safe_score"]
    assert judged["after"] == pytest.approx(sum(scores) / len(scores), abs=1e-3)
    assert summary["safe_score"]["before"] != summary["safe_score"]["after"]
    assert summary["kl"] != 0


def test_an_endpoint_judges_over_a_real_socket(models: list[str], tmp_path: Path) -> None:
    pytest.importorskip("httpx")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = json.loads(request["messages"][-1]["content"])["reply"]
            verdict = json.dumps({"unsafe": len(reply) % 2 == 0, "refusal": "full_refusal"})
            data = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    more = ["--limit", "2", "--judge-url", address, "--judge-model", "chat"]
    try:
        assert command(*models, *more, "--out", tmp_path / "out") == 0
    finally:
        server.shutdown()
        server.server_close()
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    expected = [float(len(pair["after"]["response"]) % 2) for pair in pairs if pair["group"] == "unsafe"]
    judged = json.loads((tmp_path / "out/comparison.json").read_text())["judges"]["chat"]["unsafe"]
    assert judged["safe_score"]["after"] == pytest.approx(sum(expected) / len(expected))
    assert judged["safe_score"]["diff"] == 0
    assert judged["refusal"]["after"] == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "xtest"], "did you mean xstest?"),
        (["--prompts", "sample", "--val-data", "x.parquet"], "two answers to one question"),
        (["--val-data", "x.parquet", "--limit", "3"], "--limit counts prompts of --prompts"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "belong together"),
        (["--judge", "nowhere"], "nowhere"),
        (["--judge", "x,weight=3"], "'weight=3' is not KEY=VALUE"),
    ],
)
def test_mistakes_are_said_before_anything_is_generated(
    models: list[str], more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ups_rm.local.evaluate.evaluate", lambda *_, **__: pytest.fail("generated"))
    assert command(*models, *more, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_without_rm_the_one_that_was_made_here_is_taken(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REWARD_MODEL_PATH", raising=False)
    at = models.index("--rm")
    without = [*models[:at], *models[at + 2 :], "--limit", "1"]
    assert command(*without) == 2
    assert "reward_model.model.path is empty" in capsys.readouterr().err.replace("\n", " ")
    tiny_rm(tmp_path / "merge/merged_model/Naive-RM-saferlhf")
    assert command(*without) == 0
    assert (tmp_path / "runs/eval/comparison.json").is_file()


def test_results_are_not_overwritten(compared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert command(*compared, "--out", tmp_path / "out") == 2
    assert "nothing is overwritten" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
