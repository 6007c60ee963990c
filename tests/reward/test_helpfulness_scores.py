"""Score.helpfulness: from one forward pass of two heads, from a second model, over HTTP; the same number everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from talks import talks
from tiny_judge import rewrite

from tiny import tiny_hf_rm, tiny_rm
from ups_rm.errors import RecipeError, RMError
from ups_rm.recipe import RewardModel, RewardModelModel, load_recipe
from ups_rm.recipe_hash import deciding_settings, input_hashes
from ups_rm.reward.card import write_card
from ups_rm.reward.client import HttpScorer
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.hf_scorer import load_hf_scorer
from ups_rm.reward.open import inputs_of, open_scorer
from ups_rm.reward.score_file import read_lines, score_lines
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.server import RewardServer

BOTH = ("unsafety", "helpfulness")
TALKS = talks(12, seed=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("models")
    return {
        "both": tiny_rm(here / "both", heads=BOTH),
        "safety": tiny_rm(here / "safety"),
        "helpful": tiny_rm(here / "helpful", heads=("helpfulness",), seed=5),
        "reward": tiny_hf_rm(here / "reward"),
    }


def settings(folder: Path, helpfulness: RewardModelModel | None = None, **changes) -> RewardModel:
    made = RewardModel(model=RewardModelModel(path=str(folder), dtype="float32"), **changes)
    made.helpfulness = helpfulness or made.helpfulness
    return made


def helpful(**changes) -> RewardModelModel:
    return RewardModelModel(**{"output": "reward", "dtype": "float32"} | changes)


def test_a_second_folder_gives_the_number_that_it_gives_alone(folders):
    scores = open_scorer(settings(folders["safety"], helpful(path=str(folders["helpful"])))).score(TALKS)
    safety = RewardScorer.load(folders["safety"], dtype="float32").score(TALKS)
    alone = RewardScorer.load(folders["helpful"], dtype="float32", safety=False).helpfulness(TALKS)
    assert [score.helpfulness for score in scores] == alone
    assert [score.logit for score in scores] == [score.logit for score in safety]


@pytest.mark.parametrize("output", ["reward", "safety"])
def test_higher_is_better_for_a_classifier_whatever_its_output_is_called(folders, output):
    entry = helpful(path=str(folders["reward"]), output=output)
    scores = open_scorer(settings(folders["safety"], entry)).score(TALKS)
    raw = load_hf_scorer(folders["reward"], "sequence", dtype="float32").score(TALKS)
    assert [score.helpfulness for score in scores] == [score.logit for score in raw]


def test_a_function_judges_helpfulness(folders):
    scores = open_scorer(settings(folders["safety"], helpful(callable="scorers_for_tests:length"))).score(TALKS)
    assert [score.helpfulness for score in scores] == [len(talk[-1]["content"]) for talk in TALKS]
    with pytest.raises(RMError, match=r"helpfulness model scorers_for_tests.not_a_number gives nan for conversation 0"):
        open_scorer(settings(folders["safety"], helpful(callable="scorers_for_tests:not_a_number"))).score(TALKS)


def test_the_service_gives_the_numbers_of_the_process(folders):
    """`/score` and HttpScorer carry the second head's logit, alone and as `reward_model.helpfulness`."""
    scorer = RewardScorer.load(folders["both"], dtype="float32")
    expected = scorer.score(TALKS)
    with RewardServer([scorer], name="two heads") as server:
        with HttpScorer(server.url) as client:
            found = client.score(TALKS)
        second = open_scorer(settings(folders["safety"], helpful(url=server.url))).score(TALKS)
        text = scorer.tokenizer.apply_chat_template(TALKS[0], tokenize=False)
        posted = {"query": [text], "prompts": None}
        logs = httpx.post(f"{server.url}/get_reward", json=posted, trust_env=False).json()["extra_logs"]
    for one, other, beside in zip(expected, found, second, strict=True):
        assert other.helpfulness == pytest.approx(one.helpfulness, abs=1e-5)
        assert other.logit == pytest.approx(one.logit, abs=1e-5)
        assert beside.helpfulness == pytest.approx(one.helpfulness, abs=1e-5)
    assert logs["rm_helpfulness"] == pytest.approx([expected[0].helpfulness], abs=1e-5)


def test_a_service_that_answers_half_of_it_is_refused():
    rows = [{"logit": 0.0, "safe_score": 0.5, "tokens": 1, "truncated": False, "helpfulness": h} for h in (1.0, None)]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"model": "m", "scores": rows})

    client = HttpScorer("http://rm", client=httpx.Client(transport=httpx.MockTransport(answer)))
    with pytest.raises(RMError, match="helpfulness for some conversations and not for others"):
        client.score(TALKS[:2])
    rows[1]["helpfulness"] = float("inf")
    rows_text = json.dumps({"model": "m", "scores": rows})
    infinite = httpx.MockTransport(lambda _: httpx.Response(200, text=rows_text))
    with pytest.raises(RMError, match="helpfulness inf: not a finite number"):
        HttpScorer("http://rm", client=httpx.Client(transport=infinite)).score(TALKS[:2])


def test_a_combination_keeps_the_helpfulness_of_its_one_member_that_has_it(folders):
    both, safety = (RewardModelModel(path=str(folders[name]), dtype="float32") for name in ("both", "safety"))
    alone = RewardScorer.load(folders["both"], dtype="float32").score(TALKS)
    scores = open_scorer(RewardModel(models=[safety, both])).score(TALKS)
    assert [score.helpfulness for score in scores] == [score.helpfulness for score in alone]
    transformed = open_scorer(settings(folders["both"], transform="logit")).score(TALKS)
    assert [score.helpfulness for score in transformed] == [score.helpfulness for score in alone]
    again = RewardModelModel(path=str(folders["both"]), dtype="float32", name="again")
    with pytest.raises(RMError, match="both and again both judge helpfulness"):
        open_scorer(RewardModel(models=[both, again])).score(TALKS)


def test_what_can_not_judge_helpfulness_or_safety_says_so(folders):
    with pytest.raises(RMError, match="can't judge safety"):
        open_scorer(settings(folders["helpful"]))
    with pytest.raises(RMError, match=r"reward_model.helpfulness: .*has no helpfulness head"):
        open_scorer(settings(folders["safety"], helpful(path=str(folders["safety"]))))
    with pytest.raises(RMError, match=r"has a helpfulness head, and reward_model\.helpfulness names another model"):
        open_scorer(settings(folders["both"], helpful(path=str(folders["helpful"])))).score(TALKS)


def test_scored_lines_have_it_where_there_is_a_head(folders, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "response_0": "Hello!", "response_1": "Go."}) + "\n")
    (line,) = score_lines(RewardScorer.load(folders["both"], dtype="float32"), read_lines(file))
    assert isinstance(line["response_0_helpfulness"], float)
    assert "response_0_model_logits" not in line
    (line,) = score_lines(RewardScorer.load(folders["safety"], dtype="float32"), read_lines(file))
    assert not any("helpfulness" in key for key in line)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward_model.helpfulness.output=unsafety"], "output=unsafety: helpfulness is a number that is higher"),
        (["reward_model.helpfulness.weight=2"], r"helpfulness\.weight=2\.0 has no effect"),
        (["reward_model.helpfulness.normalize=none"], r"helpfulness\.normalize=none has no effect"),
        (["reward_model.helpfulness.path=a", "reward_model.helpfulness.url=http://b"], "names path and url"),
        (["reward_model.helpfulness.kind=list"], r"helpfulness\.kind=list is not one of"),
        (
            ["reward_training.target=usefulness"],
            "reward_training.target=usefulness is not one of safety, helpfulness, both",
        ),
        (["reward_training.target=helpfulness"], "makes no reward model for safety, and none is named"),
        (
            ["reward_training.target=helpfulness", "reward_model.model.path=x", "reward_training.lora=true"],
            "adapters learn from labels of safety",
        ),
        (["reward_training.target=both", "reward_model.helpfulness.path=x"], "names another model"),
    ],
)
def test_a_recipe_that_asks_for_what_can_not_be_is_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("quickstart", overrides)


def test_a_recipe_without_it_decides_what_it_decided_before(folders):
    plain = load_recipe("quickstart", [f"reward_model.model.path={folders['safety']}"])
    assert "helpfulness" not in deciding_settings(plain)["reward_model"]
    second = load_recipe(
        "quickstart",
        [f"reward_model.model.path={folders['safety']}", f"reward_model.helpfulness.path={folders['helpful']}"],
    )
    assert deciding_settings(second)["reward_model"]["helpfulness"]["path"] == str(folders["helpful"])
    assert str(folders["helpful"]) in map(str, inputs_of(second.reward_model))
    assert callable(input_hashes)


def rows_by_helpfulness(folder: Path, file: Path, *, turned: bool = False) -> Path:
    """Rows whose better reply is the one that the folder itself finds more helpful; safe ones and unsafe ones too."""
    scorer, lines = RewardScorer.load(folder, dtype="float32"), []
    for i in range(40):
        question = {"role": "user", "content": f"Question {i}?"}
        replies = [f"Mix {i} flour and wait.", f"No {i * 7}, the moon."]
        scores = scorer.score([[question, {"role": "assistant", "content": reply}] for reply in replies])
        better = int(scores[1].helpfulness > scores[0].helpfulness) ^ turned  # type: ignore[operator]
        unsafe = int(scores[1].logit > scores[0].logit)
        line = {"prompt": f"Question {i}?", "response_0": replies[0], "response_1": replies[1]}
        line |= {f"is_response_{k}_safe": k != unsafe for k in range(2)}
        lines.append(json.dumps(line | {"better_response_id": better}))
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_doctor_tells_the_second_heads_direction(folders, tmp_path):
    right = check_rm(folders["both"], data=rows_by_helpfulness(folders["both"], tmp_path / "right.jsonl"), seconds=5)
    found = right["helpfulness"]
    assert (found.verdict, found.number, found.section) == ("pass", 1.0, "direction")
    assert found.details["pairs"] == 40
    turned = rows_by_helpfulness(folders["both"], tmp_path / "turned.jsonl", turned=True)
    wrong = check_rm(folders["both"], data=turned, seconds=5)
    assert wrong["helpfulness"].verdict == "fail"
    assert "flipped sign" in wrong["helpfulness"].finding
    assert wrong["direction"].verdict == right["direction"].verdict == "pass"
    alone = check_rm(folders["safety"], data=turned, seconds=5)
    assert "helpfulness" not in {check.name for check in alone.checks}
    pairs = [(TALKS[0], TALKS[1])]
    assert check_rm(folders["both"], pairs=pairs, seconds=5)["helpfulness"].verdict == "skip"


def test_the_doctor_finds_a_second_head_whose_output_layer_was_negated(folders, tmp_path):
    folder = tiny_rm(tmp_path / "rm", heads=BOTH)
    rows = rows_by_helpfulness(folder, tmp_path / "rows.jsonl")
    tensors = RewardScorer.load(folder, dtype="float32").model.state_dict()
    rewrite(folder, {k: torch.neg(v) for k, v in tensors.items() if k.startswith("myhelpful.output_layer")})
    assert "golden[" in check_rm(folder, data=rows, seconds=5)["golden logits"].finding
    write_card(folder)
    report = check_rm(folder, data=rows, seconds=5)
    assert report["helpfulness"].verdict == "fail"
    assert report["direction"].verdict == "pass"


def test_the_doctor_refuses_a_folder_for_helpfulness_alone(folders):
    report = check_rm(folders["helpful"])
    assert not report.ok
    assert "can't judge safety" in report["load"].finding
