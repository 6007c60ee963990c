"""Any reward model from a recipe: kinds, signs, combination, functions; what each entry gives is worked out by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from time import monotonic

import pytest
import scorers_for_tests
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_hf_rm, tiny_rm
from ups_rm.errors import RecipeError, RMError
from ups_rm.recipe import RewardModel, RewardModelModel, load_recipe
from ups_rm.reward.combined import CombinedScorer, Member
from ups_rm.reward.doctor.entries import check_entries, check_helpfulness
from ups_rm.reward.open import entry_names, files_of, kind_of, open_scorer, reference_conversations
from ups_rm.reward.scorer import RewardScorer
from ups_rm.reward.transforms import TRANSFORMS, score_of
from ups_rm.types import Conversation, Score

REPLIES = ["", "Bread.", "I can't help with that.", "Mix flour, water, salt and yeast, and wait."]
ASKED: list[Conversation] = [
    [{"role": "user", "content": "How?"}, {"role": "assistant", "content": reply}] for reply in REPLIES
]
LENGTHS = [float(len(reply)) for reply in REPLIES]


def function(which: str, **more) -> RewardModelModel:
    return RewardModelModel(callable=f"scorers_for_tests:{which}", **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("open")
    return {
        "myrm": tiny_rm(here / "myrm"),
        "sequence": tiny_hf_rm(here / "sequence", kind="sequence"),
        "token": tiny_hf_rm(here / "token", kind="token"),
        "causal": tiny_hf_rm(here / "causal", kind="causal"),
    }


# ---- one model


def test_one_folder_of_ours_is_the_plain_scorer(folders):
    scorer = open_scorer(RewardModel(RewardModelModel(path=str(folders["myrm"]))))
    assert isinstance(scorer, RewardScorer)
    assert scorer.max_batch_tokens == RewardModel().max_batch_tokens


@pytest.mark.parametrize("kind", ["myrm", "sequence", "token"])
@pytest.mark.parametrize(("output", "sign"), [("unsafety", 1), ("safety", -1), ("reward", -1)])
def test_every_kind_of_folder_with_either_sign(folders, kind, output, sign):
    entry = RewardModelModel(path=str(folders[kind]), output=output, dtype="float32", normalize="none")
    plain = open_scorer(RewardModel(RewardModelModel(path=str(folders[kind]), dtype="float32"))).score(ASKED)
    turned = open_scorer(RewardModel(entry)).score(ASKED)
    assert kind_of(entry) == kind
    assert [score.logit for score in turned] == pytest.approx([sign * score.logit for score in plain])
    assert [score.safe_score for score in turned] == pytest.approx([score_of(sign * score.logit) for score in plain])
    assert all(score.tokens > 0 for score in turned)


def test_an_unknown_architecture_is_an_error_that_names_it(folders):
    with pytest.raises(RMError, match=r"architecture LlamaForCausalLM is no reward model"):
        open_scorer(RewardModel(RewardModelModel(path=str(folders["causal"]))))


def test_no_model_is_an_error():
    with pytest.raises(RecipeError, match=r"reward_model\.model\.path is empty"):
        open_scorer(RewardModel())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_transform_is_the_recipes(transform):
    settings = RewardModel(function("length"), transform=transform, transform_temperature=7.0)
    for score, length in zip(open_scorer(settings).score(ASKED), LENGTHS, strict=True):
        assert score.logit == length
        assert score.safe_score == score_of(length, transform, 7.0)


# ---- functions


def test_lists_arrays_and_tensors_are_taken():
    for name in ("length", "as_tensor"):
        assert [s.logit for s in open_scorer(RewardModel(function(name))).score(ASKED)] == LENGTHS
    vowels = [sum(c in "aeiou" for c in reply) for reply in REPLIES]
    assert [s.logit for s in open_scorer(RewardModel(function("vowels"))).score(ASKED)] == vowels


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("scorers_for_tests:nowhere", "has no function nowhere"),
        ("scorers_for_tests:NUMBER", "has no function NUMBER"),
        ("no_such_module:score", "no_such_module can't be imported"),
        ("scorers_for_tests.py:length", "can't be imported"),
        ("scorers_for_tests", "is not `module:callable`"),
        ("os:system; print", "is not `module:callable`"),
        ("/tmp/mine.py:score", "is not `module:callable`"),
        ("__import__('os').system('true'):x", "is not `module:callable`"),
        ("a:b:c", "is not `module:callable`"),
        (":length", "is not `module:callable`"),
        ("scorers_for_tests:length()", "is not `module:callable`"),
        ("lambda x:x ", "is not `module:callable`"),
    ],
)
def test_only_an_importable_callable_is_taken(spec, words):
    with pytest.raises(RMError, match=words):
        open_scorer(RewardModel(RewardModelModel(callable=spec)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_too_few", "gave 3 numbers for 4"),
        ("texts", "gave list that is not one number per conversation"),
        ("not_a_number", "reward model scorers_for_tests.not_a_number gives nan for conversation 0"),
    ],
)
def test_a_function_that_answers_wrongly_is_told(name, words):
    with pytest.raises(RMError, match=words):
        open_scorer(RewardModel(function(name, output="safety"))).score(ASKED)


def test_a_function_that_does_not_answer_is_given_up_in_time():
    """`reward_model.timeout_s` holds for functions and for services; the function's own errors stay what they are."""
    model = RewardModelModel(callable="scorers_for_tests:waits")
    scorer = open_scorer(RewardModel(model=model, timeout_s=0.2))
    started = monotonic()
    with pytest.raises(
        TimeoutError, match=r"scorers_for_tests:waits gave no answer within reward_model\.timeout_s=0\.2 s"
    ):
        scorer.score(ASKED[:2])
    assert monotonic() - started < 30
    scorers_for_tests.hold.set()
    assert [score.logit for score in scorer.score(ASKED[:2])] == scorers_for_tests.length(ASKED[:2])
    own = RewardModelModel(callable="scorers_for_tests:own_timeout")
    with pytest.raises(TimeoutError, match="mine"):
        open_scorer(RewardModel(model=own)).score(ASKED[:2])
    service = open_scorer(RewardModel(model=RewardModelModel(url="http://127.0.0.1:9"), timeout_s=900.0))
    assert (service.timeout, service.max_wait) == (900.0, 2700.0)
    service.close()


def test_no_conversations_no_scores():
    assert open_scorer(RewardModel(function("length"))).score([]) == []
    both = RewardModel(models=[function("length"), function("vowels")])
    assert open_scorer(both).score([]) == []


# ---- several


class Fixed:
    """Gives its numbers in order."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def score(self, conversations: list[Conversation]) -> list[Score]:
        return [Score(number, math.nan, 1, False) for number in self.numbers]


numbers = st.lists(st.floats(-50, 50), min_size=4, max_size=4)
members = st.lists(
    st.tuples(numbers, st.sampled_from(["unsafety", "safety", "reward"]), st.floats(0.1, 9), st.floats(-5, 5),
              st.floats(0.1, 9)), min_size=1, max_size=4,
)  # fmt: skip


@given(members, st.sampled_from(TRANSFORMS), st.floats(0.5, 5))
@settings(deadline=None)
def test_the_combination_is_the_weighted_mean_of_normalised_logits(drawn, transform, temperature):
    import numpy

    combined = CombinedScorer(
        [Member(f"m{i}", Fixed(x), output, w, mean, std) for i, (x, output, w, mean, std) in enumerate(drawn)],
        transform=transform,
        temperature=temperature,
    ).score(ASKED)
    signed = numpy.array([numpy.array(x) * (1 if output == "unsafety" else -1) for x, output, *_ in drawn])
    z = (signed - numpy.array([[d[3]] for d in drawn])) / numpy.array([[d[4]] for d in drawn])
    expected = numpy.average(z, axis=0, weights=[d[2] for d in drawn])
    assert [score.logit for score in combined] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for j, score in enumerate(combined):
        assert score.safe_score == score_of(score.logit, transform, temperature)
        assert dict(score.model_logits) == {f"m{i}": signed[i, j] for i in range(len(drawn))}
        assert score.tokens == len(drawn)


def test_several_models_are_normalised_on_the_reference_rows():
    reference = reference_conversations("sample")
    assert len(reference) == 128
    lengths = [len(messages[-1]["content"]) for messages in reference]
    models = [function("length", weight=3.0), function("vowels", output="reward")]
    scorer = open_scorer(RewardModel(models=models))
    assert isinstance(scorer, CombinedScorer)
    first, second = scorer.members
    assert (first.mean, first.std) == pytest.approx((statistics.fmean(lengths), statistics.pstdev(lengths)))
    assert second.mean < 0 < second.std  # of the unsafety logit: the vowels' sign is turned
    z = [scorer.score([one])[0].logit for one in reference]
    assert statistics.fmean(z) == pytest.approx(0, abs=1e-9)
    alone = scorer.score(ASKED[:1])[0]
    assert scorer.score(ASKED)[0] == alone, "a score must not hang on its neighbours"


def test_a_reward_alone_is_normalised_and_a_fixed_one_takes_what_is_given():
    alone = open_scorer(RewardModel(function("length", output="reward")))
    fixed = open_scorer(RewardModel(function("length", normalize="fixed", mean=10.0, std=4.0)))
    assert isinstance(alone, CombinedScorer)
    assert alone.members[0].std > 1
    assert [s.logit for s in fixed.score(ASKED)] == pytest.approx([(x - 10) / 4 for x in LENGTHS])


def test_a_model_that_is_always_the_same_can_not_be_normalised():
    with pytest.raises(RMError, match=r"reward model mine answers 1 to all of 128 reference replies"):
        open_scorer(RewardModel(models=[function("length"), function("constant", name="mine")]))


def test_folders_and_functions_together(folders):
    models = [
        RewardModelModel(path=str(folders["myrm"]), dtype="float32", weight=2.0, normalize="none"),
        RewardModelModel(path=str(folders["token"]), dtype="float32", output="safety", normalize="none"),
    ]
    together = open_scorer(RewardModel(models=models)).score(ASKED)
    first = open_scorer(RewardModel(RewardModelModel(path=str(folders["myrm"]), dtype="float32"))).score(ASKED)
    second = open_scorer(RewardModel(RewardModelModel(path=str(folders["token"]), dtype="float32"))).score(ASKED)
    assert [s.logit for s in together] == pytest.approx(
        [(2 * a.logit - b.logit) / 3 for a, b in zip(first, second, strict=True)]
    )
    assert together[3].model_logits.keys() == {"myrm", "token"}
    assert together[3].tokens == first[3].tokens + second[3].tokens


def test_a_model_that_fails_is_named(folders):
    with pytest.raises(RMError, match=r"reward model other: .*no such folder"):
        open_scorer(RewardModel(models=[function("length"), RewardModelModel(path="nowhere", name="other")]))
    models = [function("length", normalize="none"), function("one_too_few", normalize="none")]
    with pytest.raises(RMError, match=r"reward model scorers_for_tests.one_too_few: .*3 numbers for 4"):
        open_scorer(RewardModel(models=models)).score(ASKED)


def test_names_are_short_distinct_and_fit_for_metrics():
    entries = [
        RewardModelModel(path="merge/merged_model/My RM"),
        RewardModelModel(path="other/My RM"),
        RewardModelModel(url="http://localhost:8000/score"),
        function("length"),
        RewardModelModel(path="x", name="mine"),
    ]
    assert entry_names(entries) == ["My_RM", "My_RM-2", "score", "scorers_for_tests.length", "mine"]
    assert files_of(function("length")) == [Path(scorers_for_tests.__file__)]


# ---- what is checked before training


def test_each_entry_is_checked_by_its_kind(folders, tmp_path):
    """A judge is asked about pairs of one prompt, without its reference replies, which are of other prompts."""
    references = tmp_path / "references.jsonl"
    references.write_text('{"prompt": "p", "response": "r"}\n')
    models = [
        RewardModelModel(path=str(folders["myrm"])),
        function("length", output="reward"),
        RewardModelModel(callable="scorers_for_tests:longer", kind="pairwise", reference_replies=str(references)),
    ]
    reports = [report for _, _, report in check_entries(RewardModel(models=models), "cpu")]
    names = [{check.name for check in report.checks} for report in reports]
    assert "golden logits" in names[0]
    assert names[1] & {"place", "golden logits", "saturation", "direction"} == {"direction"}  # it is normalised
    assert "place" in names[2]
    assert all(report["spread"].verdict == "pass" for report in reports)
    alone = RewardModel(models[2])
    assert {"saturation", "groups"} <= {c.name for _, _, report in check_entries(alone, "cpu") for c in report.checks}


@pytest.mark.parametrize(("output", "verdict"), [("safety", "fail"), ("unsafety", "pass"), ("reward", "warn")])
def test_a_flipped_function_is_refused_but_a_reward_may_be_about_something_else(tmp_path, output, verdict):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"{i}", "response_0": "No." * (i % 3 + 1), "response_1": "Yes, so much." * (i % 5 + 1),
         "is_response_0_safe": True, "is_response_1_safe": False} for i in range(40)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RewardModel(function("length", output=output), reference_data=str(file), transform="logit")
    ((_, _, report),) = check_entries(settings, "cpu")
    assert report["direction"].verdict == verdict
    assert "saturation" not in {check.name for check in report.checks}


@pytest.mark.parametrize(("name", "verdicts"), [("length", {}), ("constant", {"spread": "fail"})])
def test_a_second_model_for_helpfulness_must_answer_too(name, verdicts):
    report = check_helpfulness(RewardModel(function("length"), helpfulness=function(name, output="reward")), "cpu")
    assert report is not None
    assert {check.name: check.verdict for check in report.of("warn", "fail")} == verdicts
    assert check_helpfulness(RewardModel(function("length")), "cpu") is None


# ---- the recipe's words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward_model.models=[{pth: x}]"], r"reward_model.models\[0\].pth is not a key .* did you mean path\?"),
        (["reward_model.models=[{path: x, url: 'http://y'}]"], r"models\[0\] names path and url"),
        (["reward_model.models=[{weight: 2}]"], r"models\[0\] names nothing"),
        (["reward_model.models=[{path: x, weight: -1}]"], r"models\[0\].weight=-1.0 must be more than 0"),
        (["reward_model.models=[{path: x, std: 0}]"], r"models\[0\].std=0.0 must be more than 0"),
        (["reward_model.models=[{path: x, output: good}]"], r"models\[0\].output=good is not one of unsafety, safety"),
        (["reward_model.models=[{path: x, name: a}, {path: y, name: a}]"], "two entries have the name 'a'"),
        (["reward_model.models=[{path: x, name: a/b}]"], "must be letters, digits"),
        (["reward_model.models=[{path: x}]", "reward_model.model.path=y"], "are both given"),
        (["reward_model.model.callable=os.system"], "is not `module:callable`"),
        (["reward_model.model.callable=/tmp/x.py:f"], "is not `module:callable`"),
        (["reward_model.model.url=file:///etc/passwd"], "must begin with http"),
        (["reward_model.model.kind=http", "reward_model.model.path=x"], "kind=http needs reward_model.model.url"),
        (["reward_model.model.path=x", "reward_model.model.reference_replies=y"], "kind=pairwise only"),
        (["reward_model.transform_temperature=2"], "has no effect on reward_model.transform=sigmoid"),
        (["reward_model.transform=tanh"], "is not one of sigmoid, logit, logsigmoid, tempered_sigmoid"),
        (
            ["reward_model.model.kind=pairwise", "reward_model.model.path=x", "actor_rollout_ref.rollout.n=1"],
            r"rollout.n=1: a pairwise RM has nothing to compare",
        ),
        (
            ["reward_model.model.kind=pairwise", "reward_model.model.path=x", "trainer.test_freq=5"],
            r"rollout.val_kwargs.n=1: a pairwise RM has nothing to compare",
        ),
    ],
)
def test_recipes_that_can_not_be_honoured_are_errors(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("quickstart", overrides)


def test_entries_come_from_files_and_unknown_keys_name_their_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("reward_model:\n  models:\n  - path: a\n  - {callable: 'm:f', output: safety, weight: 2}\n")
    recipe = load_recipe(file)
    assert [type(entry) for entry in recipe.reward_model.models] == [RewardModelModel] * 2
    assert recipe.reward_model.models[1].output == "safety"
    file.write_text("reward_model:\n  models:\n  - path: a\n    wieght: 2\n")
    with pytest.raises(RecipeError, match=r"did you mean weight\?\n  in .*mine.yaml, line 4"):
        load_recipe(file)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
