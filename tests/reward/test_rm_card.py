"""The card: written by merge or `rm card`, and every mismatch at load is an error that names the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiny import llama3_tokenizer, tiny_backbone, tiny_head, tiny_rm
from ups_rm.errors import RMError
from ups_rm.reward.card import GOLDEN_CONVERSATIONS, RMCard, verify_folder, write_card
from ups_rm.reward.card_digests import leaves
from ups_rm.reward.merge import merge
from ups_rm.reward.scorer import RewardScorer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny_rm(tmp_path_factory.mktemp("card") / "rm")


@pytest.fixture
def rm(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "rm")


def edit(folder: Path, **changes) -> None:
    card = json.loads((folder / "rm_card.json").read_text())
    (folder / "rm_card.json").write_text(json.dumps(card | changes))


def test_merge_writes_a_card_that_says_what_the_numbers_mean(rm):
    card = RMCard.read(rm)
    assert card is not None
    assert "unsafety" in card.sign
    assert "sigmoid(-logit)" in card.transform
    assert card.render.bos == "one"
    assert card.render.end_token == "<|eot_id|>"
    assert card.backbone["model_type"] == "llama"
    assert card.hidden_dim_str == "16,8"
    assert card.dtype == "float32"
    assert [golden.messages for golden in card.golden] == list(GOLDEN_CONVERSATIONS)
    logits = [score.logit for score in RewardScorer.load(rm, dtype="float32").score(list(GOLDEN_CONVERSATIONS))]
    assert [golden.logit for golden in card.golden] == pytest.approx(logits, abs=1e-5)


def test_the_file_gives_the_card_back(rm):
    card = RMCard.read(rm)
    assert card is not None
    card.write(rm)
    assert RMCard.read(rm) == card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_dim_str": "16"}, "hidden_dim_str is '16', the folder has '16,8'"),
        ({"backbone": {"model_type": "qwen2"}}, "backbone.model_type is 'qwen2'"),
        ({"backbone": {"hidden_size": 64}}, "backbone.hidden_size is 64"),
        ({"backbone": {"num_hidden_layers": 3}}, "backbone.num_hidden_layers is 3"),
        ({"chat_template_sha256": "ab"}, "chat_template_sha256 is 'ab'"),
        ({"end_token": "<|nowhere|>"}, r"end_token is '<\|nowhere\|>', but"),
        ({"end_token": "<|end_of_text|>"}, r"end_token is '<\|end_of_text\|>', but the card was written"),
        ({"bos": "none"}, "bos is 'none', but the card was written with another value"),
        ({"bos": "two"}, "bos is 'two'"),
        ({"max_length": 20}, "max_length is '20', but the card was written"),
        ({"truncation_side": "up"}, "truncation_side is 'up'"),
        ({"sign": "higher = safer"}, "sign is 'higher = safer'"),
        ({"transform": "identity"}, "transform is 'identity'"),
        ({"output": "probability"}, "output is 'probability'"),
        ({"format": 3}, "format is 3"),
        ({"format": 1}, "format is 1, but the card has digests"),
        ({"temperature": "warm"}, "temperature is a str"),
        ({"golden": [{"messages": []}]}, r"golden\[0\].input_ids is missing"),
        ({"colour": "red"}, "colour is not a field"),
    ],
)
def test_every_mismatch_is_an_error_that_names_the_field(rm, changes, words):
    edit(rm, **changes)
    with pytest.raises(RMError, match=words):
        RewardScorer.load(rm, dtype="float32")


def test_a_missing_field_is_named(rm):
    card = json.loads((rm / "rm_card.json").read_text())
    del card["labels"]
    (rm / "rm_card.json").write_text(json.dumps(card))
    with pytest.raises(RMError, match="field labels is missing"):
        RewardScorer.load(rm)


def test_another_chat_template_is_found(rm):
    template = (rm / "chat_template.jinja").read_text()
    (rm / "chat_template.jinja").write_text(template.replace("trim", "upper"))
    with pytest.raises(RMError, match="chat_template_sha256"):
        RewardScorer.load(rm)


def test_another_tokenizer_with_the_same_template_is_found(rm):
    tokenizer = json.loads((rm / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    (rm / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RMError, match=r"golden\[0\].input_ids differ .* first at position"):
        RewardScorer.load(rm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", ["myscore.output_layer.weight", "myscore.layers.0.weight"])
def test_changed_weights_are_found_by_the_golden_logits(rm, weight, dtype):
    tensors = load_file(rm / "myrm.safetensors")
    tensors[weight] = -tensors[weight]
    save_file(tensors, rm / "myrm.safetensors", metadata={"format": "pt"})
    with pytest.raises(RMError, match=r"golden\[\d\].logit is .* the model answers"):
        RewardScorer.load(rm, dtype=dtype)


def test_a_slightly_changed_backbone_is_found_in_float32(rm):
    file = rm / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.02
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RMError, match=r"golden\[\d\].logit"):
        RewardScorer.load(rm, dtype="float32")


def test_a_folder_without_a_card_loads_with_a_warning_and_gets_one(rm):
    before = RMCard.read(rm)
    assert before is not None
    (rm / "rm_card.json").unlink()
    with pytest.warns(UserWarning, match="ups-rm rm card"):
        scorer = RewardScorer.load(rm, dtype="float32")
    assert scorer.card is None
    write_card(rm, labels="severity")
    after = RMCard.read(rm)
    assert after is not None
    assert after.labels == "severity"
    assert after.render == before.render
    assert [g.input_ids for g in after.golden] == [g.input_ids for g in before.golden]
    assert [g.logit for g in after.golden] == pytest.approx([g.logit for g in before.golden], abs=1e-5)
    RewardScorer.load(rm)


def test_card_with_a_template_for_a_tokenizer_without_one(tmp_path):
    rm = tiny_rm(tmp_path / "rm")
    (rm / "rm_card.json").unlink()
    (rm / "chat_template.jinja").unlink()
    with pytest.raises(RMError, match="--chat-template FILE"):
        write_card(rm)
    template = str(llama3_tokenizer().chat_template)
    write_card(rm, chat_template=template, policy={"max_length": 100, "bos": None})
    scorer = RewardScorer.load(rm)
    assert scorer.policy.max_length == 100
    assert scorer.tokenizer.chat_template == template


def test_the_card_is_readable_json_with_ids_on_one_line(rm):
    text = (rm / "rm_card.json").read_text()
    lines = [line.strip() for line in text.splitlines() if '"input_ids"' in line]
    assert len(lines) == len(GOLDEN_CONVERSATIONS)
    assert all(line.startswith('"input_ids": [') for line in lines)
    assert len(text.splitlines()) < 120


def numbered(path: str) -> list[str | int]:
    """`golden[0].messages[1].content` -> ["golden", 0, "messages", 1, "content"]."""
    return [int(part) if part.isdigit() else part for part in path.replace("[", ".").replace("]", "").split(".")]


def changed(value):
    """Another value of the same type, as near as possible."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + (1 if isinstance(value, int) else 1e-9 * max(1.0, abs(value)))
    if isinstance(value, str):
        return value + " "
    return [*value[:-1], changed(value[-1])] if value else [1]


HEAD = {
    "loss": "bce",
    "seed": 2,
    "sources": ["sample"],
    "metrics": {"held_out": {"auc": 0.8, "pairwise_ci95": [0.6, None]}},
}


def described(folder: Path) -> Path:
    """An RM whose head says much about its training, so that its card has many fields."""
    parts = folder.parent / "parts"
    backbone, head = tiny_backbone(parts / "backbone"), tiny_head(parts / "head")
    info = json.loads((head / "head.json").read_text())
    (head / "head.json").write_text(json.dumps(info | HEAD))
    merge(backbone, head, folder)
    return folder


@pytest.fixture(scope="module")
def with_head(tmp_path_factory) -> Path:
    return described(tmp_path_factory.mktemp("described") / "rm")


def test_changing_any_one_field_fails_by_its_name(with_head, tmp_path):
    """Every field of the file, nested ones and the digests themselves too, each by the least change there is."""
    from ups_rm.reward.native import load_tokenizer

    folder = shutil.copytree(with_head, tmp_path / "rm")
    tokenizer, file = load_tokenizer(folder), folder / "rm_card.json"
    text = file.read_text()
    paths = [path for path, _ in leaves(json.loads(text))]
    assert {"labels", "temperature", "head.metrics.held_out.auc", "golden[4].logit", "backbone.name"} <= set(paths)
    assert len(paths) > 100

    def load() -> None:
        card = RMCard.read(folder)
        assert card is not None
        verify_folder(card, folder, tokenizer)

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


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_ids", [1.0, 2]), ("input_ids", [True]), ("input_ids", "12"), ("logit", "0.5"), ("logit", True),
     ("logit", None), ("messages", {}), ("mood", "good")],
)  # fmt: skip
def test_a_golden_answer_of_another_type_is_named_and_not_converted(rm, name, value):
    golden = json.loads((rm / "rm_card.json").read_text())["golden"]
    golden[1][name] = value
    edit(rm, golden=golden)
    with pytest.raises(RMError, match=rf"golden\[1\]\.{name} is "):
        RewardScorer.load(rm, dtype="float32")


def test_loading_an_rm_finds_a_changed_label(rm):
    edit(rm, labels="something else")
    with pytest.raises(RMError, match=r"labels is 'something else', but the card was written with another value"):
        RewardScorer.load(rm, dtype="float32")
    edit(rm, labels="bce", mood="good")
    with pytest.raises(RMError, match="mood is not a field"):
        RewardScorer.load(rm, dtype="float32")


def test_cards_of_the_first_format_still_load(rm):
    card = json.loads((rm / "rm_card.json").read_text()) | {"format": 1}
    del card["digests"]
    (rm / "rm_card.json").write_text(json.dumps(card))
    assert RewardScorer.load(rm, dtype="float32").card is not None
    write_card(rm)
    assert json.loads((rm / "rm_card.json").read_text())["format"] == 2


def test_a_new_card_keeps_what_only_the_old_one_knows(with_head, tmp_path):
    rm = shutil.copytree(with_head, tmp_path / "rm")
    write_card(rm, policy={"max_length": 99, "truncation_side": "right"})
    before = RMCard.read(rm)
    write_card(rm)
    assert RMCard.read(rm) == before
    assert before is not None
    assert (before.render.max_length, before.labels, before.head["metrics"]) == (99, "bce", HEAD["metrics"])
    write_card(rm, labels="other", policy={"end_token": "none"})
    after = RMCard.read(rm)
    assert after is not None
    assert (after.labels, after.render.end_token, after.render.max_length) == ("other", None, 99)
    assert after.backbone == before.backbone
    write_card(rm, infer=True)
    inferred = RMCard.read(rm)
    assert inferred is not None
    assert (inferred.labels, inferred.render.end_token, inferred.render.max_length) == ("other", "<|eot_id|>", 1024)
    (rm / "rm_card.json").write_text("{")
    with pytest.warns(UserWarning, match="nothing of the old card is kept"):
        write_card(rm)
    RewardScorer.load(rm, dtype="float32")
