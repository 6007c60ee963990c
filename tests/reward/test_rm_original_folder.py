"""Folders of the original merge tool load as they are, natively and with the code they bring.

The folder is built here the way that tool leaves it: the backbone's own config.json with `model_type: llama`,
`architectures: LlamaForSequenceClassification`, `hidden_dim_str` and an auto_map; the head appended in a shard of its
own; an unused `score` layer; a pad token added to tokenizer and config; `total_size` plus the head's *elements*.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForTokenClassification, LlamaForSequenceClassification, LlamaModel

from tiny import LLAMA3_TEMPLATE, head_tensors, llama3_tokenizer, tiny_backbone, tiny_rm
from ups_rm.errors import RMError
from ups_rm.reward.card import GOLDEN_CONVERSATIONS, RMCard, write_card
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.render import render
from ups_rm.reward.scorer import RewardScorer

# As short as such code gets, with its known weakness: it reads position mask.sum() - 1, wrong with left padding.
CONFIGURATION = """
from transformers.models.llama import LlamaConfig

class MyRMConfig(LlamaConfig):
    model_type = "myrm"
    def __init__(self, hidden_dim_str="256", **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim_str = hidden_dim_str
"""
MODELING = """
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.llama import LlamaConfig, LlamaPreTrainedModel
from .configuration_myrm import MyRMConfig

AutoConfig.register("myrm", MyRMConfig)

class Head(nn.Module):
    def __init__(self, size, dims):
        super().__init__()
        dims = [size] + [int(d) for d in str(dims).split(",")]
        self.layers = nn.ModuleList(nn.Linear(dims[i], dims[i + 1]) for i in range(len(dims) - 1))
        self.output_layer = nn.Linear(dims[-1], 1)
    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x))
        return self.output_layer(x)

class MyRMForTokenClassification(LlamaPreTrainedModel):
    base_model_prefix = "model"
    config: MyRMConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(LlamaConfig.from_dict(config.to_dict()))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.myscore = Head(config.hidden_size, config.hidden_dim_str)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        return TokenClassifierOutput(logits=self.myscore(hidden[torch.arange(len(hidden)), last]))
"""
REWARD_TEMPLATE = LLAMA3_TEMPLATE


def original_folder(folder: Path, *, score: str = "kept", model_type: str = "llama", pad: str = "grown") -> Path:
    """score: "kept" in shard and index, "gone from index", "gone". pad: "grown" embedding, or "beyond" it."""
    tokenizer = llama3_tokenizer(pad_token="[PAD]")
    backbone = tiny_backbone(folder, tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(backbone)
    if pad == "beyond":
        config.pad_token_id = config.vocab_size
    config.num_labels = 1
    torch.manual_seed(5)
    shape = type(config)(**{**config.to_dict(), "pad_token_id": 0})
    model = LlamaForSequenceClassification(shape)
    model.model.load_state_dict(LlamaModel.from_pretrained(backbone).state_dict())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    listed = {name: "model-00001-of-00001.safetensors" for name in tensors if name != "score.weight" or score == "kept"}
    if score == "gone":
        del tensors["score.weight"]
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    head = {f"myscore.{name}": tensor for name, tensor in head_tensors().items()}
    save_file(head, folder / "myrm.safetensors")
    size = sum(t.numel() * 4 for t in tensors.values()) + sum(t.numel() for t in head.values())
    listed |= dict.fromkeys(head, "myrm.safetensors")
    index = {"metadata": {"total_size": size}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = config.to_dict() | {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": model_type,
        "hidden_dim_str": "16,8",
        "auto_map": {
            "AutoConfig": "configuration_myrm.MyRMConfig",
            "AutoModelForTokenClassification": "modeling_myrm.MyRMForTokenClassification",
        },
        "_name_or_path": "/somewhere/else/IPS-RM",
        "torch_dtype": "float32",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    # as transformers 4 wrote it
    values["rope_theta"], values["rope_scaling"] = values.pop("rope_parameters")["rope_theta"], None
    values.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True))
    (folder / "configuration_myrm.py").write_text(CONFIGURATION)
    (folder / "modeling_myrm.py").write_text(MODELING)
    return folder


def expected_logits(folder: Path, scorer: RewardScorer) -> list[float]:
    """Backbone tensors straight from the shard, head by hand, one conversation at a time."""
    fields = json.loads((folder / "config.json").read_text())
    known = {k: v for k, v in fields.items() if k not in ("auto_map", "hidden_dim_str", "pad_token_id", "model_type")}
    model = LlamaModel(type(AutoConfig.for_model("llama"))(**known)).eval()
    shard = load_file(folder / "model-00001-of-00001.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in shard.items() if k.startswith("model.")})
    head, logits = head_tensors(), []
    for row in render(scorer.tokenizer, list(GOLDEN_CONVERSATIONS), scorer.policy):
        with torch.inference_mode():
            x = model(torch.tensor([row.input_ids])).last_hidden_state[:, -1]
            for i in range(2):
                x = F.leaky_relu(F.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"]))
            logits.append(F.linear(x, head["output_layer.weight"], head["output_layer.bias"]).item())
    return logits


@pytest.mark.filterwarnings("ignore:.*no rm_card.json")
@pytest.mark.parametrize("model_type", ["llama", "myrm"])
@pytest.mark.parametrize("score", ["kept", "gone from index", "gone"])
@pytest.mark.parametrize("pad", ["grown", "beyond"])
def test_it_loads_natively_with_the_right_logits(tmp_path, model_type, score, pad):
    folder = original_folder(tmp_path / "Naive-RM-saferlhf", score=score, model_type=model_type, pad=pad)
    scorer = RewardScorer.load(folder, dtype="float32")
    found = [s.logit for s in scorer.score(list(GOLDEN_CONVERSATIONS))]
    assert found == pytest.approx(expected_logits(folder, scorer), abs=2e-5)


@pytest.mark.filterwarnings("ignore:.*no rm_card.json")
@pytest.mark.parametrize("score", ["kept", "gone from index", "gone"])
@pytest.mark.parametrize("pad", ["grown", "beyond"])
def test_it_loads_with_its_own_code_with_the_same_logits(tmp_path, score, pad):
    folder = original_folder(tmp_path / f"remote-{score.replace(' ', '-')}-{pad}", score=score, pad=pad)
    native = RewardScorer.load(folder, dtype="float32").score(list(GOLDEN_CONVERSATIONS))
    own = RewardScorer.load(folder, dtype="float32", trust_remote_code=True).score(list(GOLDEN_CONVERSATIONS))
    assert [s.logit for s in own] == pytest.approx([s.logit for s in native], abs=2e-5)


def test_plain_transformers_still_loads_it_after_ours(tmp_path):
    """Its code registers its own "myrm" with transformers; ours must not stand in its way."""
    folder = original_folder(tmp_path / "plain-after-ours")
    with pytest.warns(UserWarning, match="no rm_card.json"):
        RewardScorer.load(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")


@pytest.mark.filterwarnings("ignore:.*no rm_card.json")
def test_folders_with_different_code_live_in_one_process(tmp_path):
    """The original's code registers its "myrm" with transformers for the whole process; ours must not fall for it."""
    original, ours = original_folder(tmp_path / "theirs-first"), tiny_rm(tmp_path / "ours-second")
    for _ in range(2):
        for remote in (True, False):
            for folder in (original, ours):
                scorer = RewardScorer.load(folder, dtype="float32", trust_remote_code=remote)
                expected = RewardScorer.load(folder, dtype="float32")
                for a, b in zip(*(s.score(list(GOLDEN_CONVERSATIONS)) for s in (scorer, expected)), strict=True):
                    assert a.logit == pytest.approx(b.logit, abs=2e-5)


@pytest.mark.filterwarnings("ignore:.*no rm_card.json")
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["myscore.layers.0.weight", "myscore.output_layer.bias"])
def test_a_missing_head_weight_is_fatal_by_name(tmp_path, name, remote):
    folder = original_folder(tmp_path / f"missing-{remote}-{name.replace('.', '-')}")
    tensors = load_file(folder / "myrm.safetensors")
    del tensors[name]
    save_file(tensors, folder / "myrm.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RMError, match=name.replace(".", r"\.")):
        RewardScorer.load(folder, trust_remote_code=remote)


@pytest.mark.filterwarnings("ignore:.*no rm_card.json")
@pytest.mark.parametrize("remote", [False, True])
def test_an_unexpected_head_weight_is_fatal_by_name(tmp_path, remote):
    folder = original_folder(tmp_path / f"unexpected-{remote}")
    tensors = load_file(folder / "myrm.safetensors") | {"myscore.layers.2.weight": torch.zeros(8, 8)}
    save_file(tensors, folder / "myrm.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["myscore.layers.2.weight"] = "myrm.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RMError, match=r"myscore\.layers\.2\.weight"):
        RewardScorer.load(folder, trust_remote_code=remote)


@pytest.mark.parametrize("hidden_dim_str", ["16,8", "16, 8", [16, 8]])
def test_hidden_dim_in_any_of_its_spellings(tmp_path, hidden_dim_str):
    folder = original_folder(tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dim_str": hidden_dim_str}))
    write_card(folder)
    card = RMCard.read(folder)
    assert card is not None
    assert card.hidden_dim_str == "16,8"
    RewardScorer.load(folder)


def test_old_rope_settings_are_understood(tmp_path):
    folder = original_folder(tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    changed = config | {"rope_theta": 500.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.warns(UserWarning, match="no rm_card.json"):
        scorer = RewardScorer.load(folder, dtype="float32")
    assert scorer.model.model.config.rope_parameters["rope_theta"] == 500.0
    assert scorer.model.model.config.rope_parameters["rope_type"] == "llama3"
    found = [s.logit for s in scorer.score(list(GOLDEN_CONVERSATIONS))]
    assert found == pytest.approx(expected_logits(folder, scorer), abs=2e-5)


def test_check_shows_that_its_code_misreads_left_padding_and_ours_does_not(tmp_path):
    folder = original_folder(tmp_path / "left-padding")
    write_card(folder)
    verdicts = {c.name: c.verdict for c in check_rm(folder).checks}
    assert verdicts["left padding"] == verdicts["card"] == verdicts["golden logits"] == "pass"
    assert verdicts["index"] == "warn"  # total_size counts elements
    own = {c.name: c for c in check_rm(folder, trust_remote_code=True).checks}
    assert own["right padding"].verdict == "pass"
    assert own["left padding"].verdict == "fail"
    assert "our code" in own["left padding"].way_out


def test_a_folder_of_another_kind_needs_its_own_code(tmp_path):
    backbone = tiny_backbone(tmp_path / "no-rm")
    with pytest.raises(RMError, match="hidden_dim_str"), pytest.warns(UserWarning, match="no rm_card.json"):
        RewardScorer.load(backbone)
    with pytest.raises(RMError, match="no such folder"):
        RewardScorer.load(tmp_path / "nowhere")
