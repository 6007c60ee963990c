"""Training against any reward models, through the whole trainer: each is logged, and rewards follow the transform."""

from __future__ import annotations

import json
import shutil
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tiny import tiny_hf_rm, tiny_policy, tiny_rm
from tiny_training import tiny_recipe
from ups_rm.errors import RMError
from ups_rm.local.evaluate import evaluate, held_out_prompts
from ups_rm.local.preflight import check_before_training
from ups_rm.local.scoring import evaluation_scorer
from ups_rm.local.trainer import Trainer
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.transforms import safe_score, score_of
from ups_rm.tracking.group_log import read_group_log
from ups_rm.tracking.jsonl import read_metrics

STEPS = ["trainer.total_training_steps=1", "data.max_response_length=6"]


def longer(pairs: list) -> list[float]:
    """A judge of pairs: the longer reply is preferred."""
    return [0.1 * (len(a) - len(b)) for _, a, b in pairs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("any")
    return {
        "policy": tiny_policy(here / "policy"),
        "myrm": tiny_rm(here / "myrm"),
        "sequence": tiny_hf_rm(here / "sequence"),
    }


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[str]:
    """A service that answers /score as `ups-rm rm serve` does, on a free port; wants the token `secret`."""
    scorer = RewardScorer.load(folders["myrm"], dtype="float32")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["conversations"]
            known = self.headers["authorization"] == "Bearer secret"
            answer = {"scores": [vars(score) for score in scorer.score(asked)]} if known else {"error": "who?"}
            body = json.dumps(answer).encode()
            self.send_response(200 if known else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("transform", ["logit", "tempered_sigmoid"])
def test_every_model_and_the_transform_are_in_metrics_and_group_log(folders, tmp_path, server, monkeypatch, transform):
    monkeypatch.setenv("SCORING_TOKEN", "secret")
    models = [
        {"path": str(folders["myrm"]), "dtype": "float32", "name": "ours", "weight": 2},
        {"path": str(folders["sequence"]), "dtype": "float32", "name": "theirs", "output": "safety"},
        {"callable": f"{__name__}:longer", "kind": "pairwise", "name": "judge", "output": "reward"},
        {"url": server, "token_env": "SCORING_TOKEN", "name": "remote", "normalize": "fixed", "std": 2},
    ]
    settings = [f"reward_model.models={json.dumps(models)}", f"reward_model.transform={transform}"]
    if transform == "tempered_sigmoid":
        settings += ["reward_model.transform_temperature=3"]
    recipe = tiny_recipe(tmp_path, folders["policy"], *STEPS, *settings)
    check_before_training(recipe)
    Trainer(recipe).fit()
    (metrics,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    log = read_group_log(tmp_path / "run" / "groups" / "step_000001.jsonl")
    samples = [sample for group in log.groups for sample in group.samples]
    assert len(samples) == 16
    temperature = recipe.reward_model.transform_temperature
    for sample in samples:
        assert list(sample.model_logits) == ["ours", "theirs", "judge", "remote"]
        assert sample.model_logits["remote"] == pytest.approx(sample.model_logits["ours"], abs=1e-5)
        assert sample.safe_score == pytest.approx(score_of(sample.logit, transform, temperature), abs=1e-6)
    for name in samples[0].model_logits:
        logits = [sample.model_logits[name] for sample in samples]
        assert metrics[f"score/{name}/logit_mean"] == pytest.approx(statistics.fmean(logits), abs=1e-5)
        groups = [[sample.model_logits[name] for sample in group.samples] for group in log.groups]
        assert metrics[f"score/{name}/group_std_mean"] == pytest.approx(
            statistics.fmean(map(statistics.stdev, groups)), abs=1e-5
        )
    judged = [sum(sample.model_logits["judge"] for sample in group.samples) for group in log.groups]
    assert judged == pytest.approx([0.0] * len(judged), abs=1e-5)  # preferences within a group cancel
    for key, name in (("group/logit_std_mean", "logit"), ("group/std_mean", "safe_score")):
        spreads = [statistics.stdev(getattr(sample, name) for sample in group.samples) for group in log.groups]
        assert metrics[key] == pytest.approx(statistics.fmean(spreads), abs=1e-5)
    assert log.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in log.groups]
    assert (metrics["score/saturated_share"] == 0) or transform != "logit"
    if transform == "logit":
        compared = evaluation_scorer(recipe).score([[{"role": "user", "content": "Hi"}, {"role": "assistant",
                   "content": reply}] for reply in ("No.", "Yes, of course.")])  # fmt: skip
        assert [score.safe_score for score in compared] == [safe_score(score.logit) for score in compared]


def test_the_service_wants_its_token(folders, tmp_path, server, monkeypatch):
    given = [f"reward_model.model.url={server}", "reward_model.model.token_env=SCORING_TOKEN"]
    monkeypatch.delenv("SCORING_TOKEN", raising=False)
    with pytest.raises(RMError, match="SCORING_TOKEN \\(token_env\\) is not set"):
        Trainer(tiny_recipe(tmp_path, folders["policy"], *STEPS, *given))
    monkeypatch.setenv("SCORING_TOKEN", "secret")
    scorer = Trainer(tiny_recipe(tmp_path, folders["policy"], *STEPS, *given)).scorer
    ours = RewardScorer.load(folders["myrm"], dtype="float32")
    asked = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
    assert scorer.score(asked) == ours.score(asked)


def test_a_judge_of_pairs_compares_the_replies_of_both_policies(folders, tmp_path):
    """Against its own group alone the mean preference of every policy is 0; both in one call can differ."""
    given = ["reward_model.model.kind=pairwise", f"reward_model.model.callable={__name__}:longer"]
    other = tiny_policy(tmp_path / "other", seed=5)
    recipe = tiny_recipe(tmp_path, folders["policy"], *given, "reward_model.model.output=reward", "evaluation.n=2",
                         "evaluation.max_new_tokens=6")  # fmt: skip
    from ups_rm.data.prompts import read_prompts

    prompts = held_out_prompts(read_prompts([str(recipe.data.val_files)]), recipe)
    comparison = evaluate(recipe, folders["policy"], other, prompts, evaluation_scorer(recipe))
    before, after = ([reply.logit for reply in replies] for replies in (comparison.before, comparison.after))
    assert sum(before) + sum(after) == pytest.approx(0, abs=1e-9)
    assert abs(sum(before)) > 0.01
    lengths = [len(reply.response) for reply in comparison.after]
    longest = lengths.index(max(lengths))
    assert after[longest] < 0, "longer is preferred, so its unsafety logit is below 0"


def constant(conversations: list) -> list[float]:
    """No reward model: it answers the same to everything."""
    return [2.0] * len(conversations)


def test_training_refuses_what_is_no_reward_model(folders, tmp_path):
    given = [f"reward_model.model.callable={__name__}:constant"]
    with pytest.raises(RMError, match="answers 2 to all of"):
        check_before_training(tiny_recipe(tmp_path, folders["policy"], *STEPS, *given))


def test_training_refuses_a_classifier_that_fails_the_doctor(folders, tmp_path):
    two = tiny_hf_rm(tmp_path / "two", labels=2)
    given = [f"reward_model.model.path={two}", "reward_model.model.output=safety"]
    with pytest.raises(RMError, match=r"(?s)load: .*has 2 labels.*rm check .*two --output safety"):
        check_before_training(tiny_recipe(tmp_path, folders["policy"], *STEPS, *given))
    doubled = shutil.copytree(folders["sequence"], tmp_path / "doubled")
    template = (doubled / "chat_template.jinja").read_text(encoding="utf-8")
    file = tmp_path / "doubled.jinja"
    file.write_text(template.replace("= bos_token + text", "= bos_token + bos_token + text"), encoding="utf-8")
    given = [f"reward_model.model.path={doubled}", f"reward_model.model.template={file}"]
    with pytest.raises(RMError, match="bos: double BOS"):
        check_before_training(tiny_recipe(tmp_path, folders["policy"], *STEPS, *given))
    check_before_training(tiny_recipe(tmp_path, folders["policy"], *STEPS, given[0]))
