"""Two heads in one RM folder: each answers as it does alone, in one forward pass, and nothing of it may go missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_rm_card import changed, numbered
from test_rm_folder import TALKS

from tiny import tiny_backbone, tiny_head, tiny_rm
from ups_rm.errors import RMError
from ups_rm.reward.card import HELPFUL_SIGN, RMCard, verify_folder, write_card
from ups_rm.reward.card_digests import leaves
from ups_rm.reward.merge import merge
from ups_rm.reward.model_card import describe
from ups_rm.reward.native import load_tokenizer
from ups_rm.reward.scorer import RewardScorer

BOTH = ("unsafety", "helpfulness")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of one backbone: both heads in one folder, and each in a folder of its own."""
    here = tmp_path_factory.mktemp("heads")
    backbone, safety = tiny_backbone(here / "backbone"), tiny_head(here / "safety", seed=2)
    helpful = tiny_head(here / "helpful", seed=9, output="helpfulness", temperature=1.7)
    merge(backbone, safety, here / "both", helpfulness_head=helpful)
    merge(backbone, safety, here / "unsafety")
    merge(backbone, helpful, here / "helpfulness")
    for name in ("both", "unsafety", "helpfulness"):  # what finds changed weights without one is tested here
        (here / name / "manifest.json").unlink()
    return {name: here / name for name in ("both", "unsafety", "helpfulness", "backbone", "safety", "helpful")}


@pytest.fixture
def both(folders, tmp_path) -> Path:
    return shutil.copytree(folders["both"], tmp_path / "rm")


def test_both_heads_answer_as_each_does_alone(folders):
    """Bitwise: the same hidden state, and heads that know nothing of each other."""
    scores = RewardScorer.load(folders["both"], dtype="float32").score(TALKS)
    alone = RewardScorer.load(folders["unsafety"], dtype="float32").score(TALKS)
    helpful = RewardScorer.load(folders["helpfulness"], dtype="float32", safety=False).helpfulness(TALKS)
    assert [score.logit for score in scores] == [score.logit for score in alone]
    assert [score.safe_score for score in scores] == [score.safe_score for score in alone]
    assert [score.helpfulness for score in scores] == helpful
    assert [score.helpfulness for score in alone] == [None] * len(TALKS)
    assert len({round(score.helpfulness - score.logit, 3) for score in scores if score.helpfulness is not None}) > 3


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_replies_that_share_a_prompt_get_the_helpfulness_of_each_alone(tmp_path, pooling):
    scorer = RewardScorer.load(tiny_rm(tmp_path / "rm", pooling=pooling, heads=BOTH), dtype="float32")
    question = {"role": "user", "content": "Tell me about the planets, the sun and the moon, and a little of bread."}
    talks = [[question, {"role": "assistant", "content": f"The moon {'is round. ' * n}"}] for n in range(5)]
    alone = [scorer.score([talk])[0] for talk in talks]
    together = scorer.score(talks)
    for one, other in zip(alone, together, strict=True):
        assert other.helpfulness == pytest.approx(one.helpfulness, abs=1e-5)
        assert other.logit == pytest.approx(one.logit, abs=1e-5)


def test_a_folder_for_safety_alone_says_nothing_of_heads(folders):
    """As before there were two: names of weights, config, card and shape of the logits."""
    folder = folders["unsafety"]
    config, card = (json.loads((folder / name).read_text()) for name in ("config.json", "rm_card.json"))
    assert "heads" not in config
    assert config["id2label"] == {"0": "unsafe"}
    assert not {"outputs", "helpfulness_head"} & set(card)
    assert all(set(golden) == {"messages", "input_ids", "logit"} for golden in card["golden"])
    assert {name.split(".")[0] for name in load_file(folder / "myrm.safetensors")} == {"myscore"}
    model = RewardScorer.load(folder, dtype="float32").model
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 1)
    assert not hasattr(model, "myhelpful")


def test_weights_and_config_of_two_heads(folders):
    config = json.loads((folders["both"] / "config.json").read_text())
    assert config["heads"] == list(BOTH)
    assert config["id2label"] == {"0": "unsafe", "1": "helpful"}
    made = load_file(folders["both"] / "myrm.safetensors")
    assert {name.split(".")[0] for name in made} == {"myscore", "myhelpful"}
    assert torch.equal(
        made["myscore.layers.0.weight"], load_file(folders["safety"] / "head.safetensors")["layers.0.weight"]
    )
    helpful = load_file(folders["helpful"] / "head.safetensors")
    assert torch.equal(made["myhelpful.output_layer.weight"], helpful["output_layer.weight"] / 1.7)
    index = json.loads((folders["both"] / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["myhelpful.layers.1.bias"] == "myrm.safetensors"


PLAIN = """
import json, sys, torch
from transformers import AutoModelForTokenClassification
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([[1, 2, 3, 4]])).logits.tolist()))
"""


def test_plain_transformers_loads_both_with_the_folders_own_code(folders):
    found = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folders["both"])], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    scorer = RewardScorer.load(folders["both"], dtype="float32")
    assert json.loads(found.stdout)[0] == pytest.approx(scorer.batch_answers([[1, 2, 3, 4]])[0], abs=1e-5)
    remote = RewardScorer.load(folders["both"], dtype="float32", trust_remote_code=True)
    assert remote.score(TALKS)[0].helpfulness == pytest.approx(scorer.score(TALKS)[0].helpfulness, abs=1e-5)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["myhelpful.layers.1.bias", "myhelpful.output_layer.weight", "myscore.layers.0.bias"])
def test_a_missing_weight_of_either_head_is_fatal_by_name(both, name, remote):
    tensors = load_file(both / "myrm.safetensors")
    del tensors[name]
    save_file(tensors, both / "myrm.safetensors", metadata={"format": "pt"})
    index = json.loads((both / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RMError, match=name.replace(".", r"\.")):
        RewardScorer.load(both, trust_remote_code=remote)


def test_a_second_head_that_the_config_does_not_name_is_fatal(both):
    config = json.loads((both / "config.json").read_text())
    del config["heads"]
    (both / "config.json").write_text(json.dumps(config))
    (both / "rm_card.json").unlink()
    with pytest.warns(UserWarning, match="no rm_card"), pytest.raises(RMError, match=r"myhelpful\.layers\.0\.bias"):
        RewardScorer.load(both)


@pytest.mark.parametrize("heads", [["helpfulness", "unsafety"], ["unsafety", "mood"], "unsafety", []])
def test_heads_that_there_are_not_are_named(both, heads):
    config = json.loads((both / "config.json").read_text()) | {"heads": heads}
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(RMError, match="heads are"):
        RewardScorer.load(both)


def test_a_helpfulness_folder_is_no_rm_for_safety(folders):
    with pytest.raises(RMError, match=r"helpfulness head alone .*can't judge safety\n  fix: name it as reward_model"):
        RewardScorer.load(folders["helpfulness"])
    scorer = RewardScorer.load(folders["helpfulness"], dtype="float32", safety=False)
    with pytest.raises(RMError, match="can't judge safety"):
        scorer.score(TALKS)
    with pytest.raises(RMError, match="no helpfulness head"):
        RewardScorer.load(folders["unsafety"]).helpfulness(TALKS)


def test_heads_that_do_not_fit_together_are_refused(folders, tmp_path):
    other = tiny_head(tmp_path / "other", hidden_dims=(16,), output="helpfulness")
    with pytest.raises(RMError, match=r"differ in hidden_dims: \[16, 8\] and \[16\]"):
        merge(folders["backbone"], folders["safety"], tmp_path / "rm", helpfulness_head=other)
    mean = tiny_head(tmp_path / "mean", pooling="mean", output="helpfulness")
    with pytest.raises(RMError, match="differ in pooling"):
        merge(folders["backbone"], folders["safety"], tmp_path / "rm", helpfulness_head=mean)
    with pytest.raises(RMError, match=r"a head for unsafety, .* one for unsafety"):
        merge(folders["backbone"], folders["safety"], tmp_path / "rm", helpfulness_head=folders["safety"])
    with pytest.raises(RMError, match=r"a head for helpfulness, .* one for helpfulness"):
        merge(folders["backbone"], folders["helpful"], tmp_path / "rm", helpfulness_head=folders["helpful"])
    assert not (tmp_path / "rm").exists()


def test_the_card_names_each_output_and_has_golden_logits_for_each(folders):
    card = RMCard.read(folders["both"])
    assert card is not None
    assert card.heads == BOTH
    assert "unsafety" in card.outputs["unsafety"]
    assert card.outputs["helpfulness"] == HELPFUL_SIGN
    assert card.helpfulness_head["temperature"] == 1.7
    scores = RewardScorer.load(folders["both"], dtype="float32").score([list(g.messages) for g in card.golden])
    assert [golden.helpfulness for golden in card.golden] == pytest.approx([s.helpfulness for s in scores], abs=1e-5)
    shown = dict(describe(card))
    assert "unsafety" in shown["output"]
    assert HELPFUL_SIGN in shown["helpfulness"]
    readme = (folders["both"] / "README.md").read_text()
    assert HELPFUL_SIGN in readme
    alone = RMCard.read(folders["helpfulness"])
    assert alone is not None
    assert (alone.heads, alone.sign) == (("helpfulness",), HELPFUL_SIGN)


def test_changing_any_one_field_of_a_card_of_two_heads_fails_by_its_name(both):
    tokenizer, file = load_tokenizer(both), both / "rm_card.json"
    text = file.read_text()
    paths = [path for path, _ in leaves(json.loads(text))]
    assert {"outputs.unsafety", "outputs.helpfulness", "golden[3].helpfulness", "helpfulness_head.loss"} <= set(paths)

    def load() -> None:
        card = RMCard.read(both)
        assert card is not None
        verify_folder(card, both, tokenizer)

    load()
    for path in paths:
        card = json.loads(text)
        *way, last = numbered(path) if not path.startswith("digests.") else ["digests", path.removeprefix("digests.")]
        place = card
        for part in way:
            place = place[part]
        place[last] = changed(place[last])
        file.write_text(json.dumps(card))
        with pytest.raises(RMError) as error:
            load()
        assert path in str(error.value), (path, str(error.value))
        del place[last]
        file.write_text(json.dumps(card))
        with pytest.raises(RMError) as error:
            load()
        assert path in str(error.value), (path, str(error.value))
    for name in ("outputs", "helpfulness_head"):
        card = json.loads(text)
        del card[name]
        file.write_text(json.dumps(card))
        with pytest.raises(RMError, match=name):
            load()


def test_another_helpfulness_head_is_found_by_its_golden_logits(both):
    tensors = load_file(both / "myrm.safetensors")
    tensors["myhelpful.layers.0.weight"] = tensors["myhelpful.layers.0.weight"].flip(0)
    save_file(tensors, both / "myrm.safetensors", metadata={"format": "pt"})
    with pytest.raises(RMError, match=r"golden\[\d\]\.helpfulness is"):
        RewardScorer.load(both, dtype="float32")
    write_card(both)
    RewardScorer.load(both, dtype="float32")
    card = RMCard.read(both)
    assert card is not None
    assert card.helpfulness_head["temperature"] == 1.7


def test_a_helpfulness_logit_that_is_not_finite_is_an_error(both):
    scorer = RewardScorer.load(both, dtype="float32")
    with torch.no_grad():
        scorer.model.myhelpful.output_layer.bias.fill_(torch.nan)
    with pytest.raises(RMError, match="logit of helpfulness is nan for conversation 0"):
        scorer.score(TALKS)
