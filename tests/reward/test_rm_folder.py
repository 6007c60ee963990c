"""The RM folder: a strict merge, bitwise equal to backbone then head, and loadable by plain transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from tiny import head_tensors, llama3_tokenizer, tiny_backbone, tiny_head, tiny_rm
from ups_rm.errors import PolicyError, RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.head_files import read_head
from ups_rm.reward.merge import load_backbone, merge, write_weights
from ups_rm.reward.native import load_model
from ups_rm.reward.scorer import RewardScorer

TALKS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    for question, reply in (
        ("How do I bake bread?", "Mix flour and water, and wait."),
        ("Tell me about the moon.", "No."),
        ("x", ""),
        ("A longer question about the planets, the sun and much else?", "It depends. " * 12),
    )
]


@pytest.fixture(scope="module")
def rm(tmp_path_factory) -> Path:
    return tiny_rm(tmp_path_factory.mktemp("rm") / "Naive-RM-saferlhf")


def by_hand(backbone: Path, tensors: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Backbone by AutoModel, then the head in plain torch, one conversation."""
    model = AutoModel.from_pretrained(backbone)
    with torch.inference_mode():
        x = model(torch.tensor([ids])).last_hidden_state[:, -1].float()
        for i in range(len(tensors) // 2 - 1):
            x = F.leaky_relu(F.linear(x, tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]))
        return F.linear(x, tensors["output_layer.weight"], tensors["output_layer.bias"])


def test_index_counts_bytes_and_lists_every_tensor(rm):
    index = json.loads((rm / "model.safetensors.index.json").read_text())
    tensors = {name: file for file in rm.glob("*.safetensors") for name in load_file(file)}
    size = sum(t.numel() * t.element_size() for file in rm.glob("*.safetensors") for t in load_file(file).values())
    assert index["weight_map"] == {name: file.name for name, file in tensors.items()}
    assert index["metadata"]["total_size"] == size
    assert {name.split(".")[0] for name in tensors} == {"model", "myscore"}


def test_every_backbone_weight_is_there_bit_by_bit(rm):
    source = load_file(rm.parent / f"{rm.name}-parts" / "backbone" / "model.safetensors")
    made = {name: t for file in rm.glob("*.safetensors") for name, t in load_file(file).items()}
    backbone = {name: t for name, t in source.items() if name != "lm_head.weight"}
    assert {name for name in made if name.startswith("model.")} == set(backbone)
    assert all(torch.equal(made[name], tensor) for name, tensor in backbone.items())
    head = head_tensors(seed=2)
    assert {n: t for n, t in made.items() if n.startswith("myscore.")}.keys() == {f"myscore.{n}" for n in head}
    assert all(torch.equal(made[f"myscore.{n}"], t) for n, t in head.items())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("hidden_dims", [(), (16,), (256, 64), (8, 8, 8)])
def test_logits_are_bitwise_backbone_then_head(tmp_path, architecture, hidden_dims):
    rm = tiny_rm(tmp_path / "rm", architecture=architecture, hidden_dims=hidden_dims)
    scorer = RewardScorer.load(rm, dtype="float32")
    tensors = head_tensors(hidden_dims=hidden_dims, seed=2)
    for talk in TALKS:
        ids = scorer.tokenizer(scorer.tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)
        expected = by_hand(tmp_path / "rm-parts" / "backbone", tensors, ids.input_ids)
        with torch.inference_mode():
            found = scorer.model(input_ids=torch.tensor([ids.input_ids])).logits
        assert found.shape == (1, 1)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


PLAIN = """
import json, sys
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

folder, dtype = sys.argv[1:3]
model, info = AutoModelForTokenClassification.from_pretrained(
    folder, trust_remote_code=True, dtype=getattr(torch, dtype), output_loading_info=True
)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.pad_token = tokenizer.eos_token
talks = json.loads(sys.argv[3])
texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
answers = {}
for side in ("right", "left"):
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    answers[side] = logits[:, 0].tolist()
assert not any(name.split(".")[0] == "ups_rm" for name in sys.modules), "ups_rm was imported"
print(json.dumps({"class": type(model).__name__, "shape": list(logits.shape), "dtype": str(logits.dtype),
    "head": str(model.myscore.output_layer.weight.dtype), "logits": answers,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}))
"""


def run_plain(folder: Path, tmp_path: Path, *, dtype="float32", check=True):
    """What plain transformers says of TALKS in a process of its own, padded on either side."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", PLAIN, str(folder), dtype, json.dumps(TALKS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])
    return done


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_plain_transformers_loads_it_where_ups_rm_was_never_imported(tmp_path, architecture):
    rm = tiny_rm(tmp_path / "rm", architecture=architecture)
    ours = [score.logit for score in RewardScorer.load(rm, dtype="float32").score(TALKS)]
    shutil.rmtree(tmp_path / "rm-parts")  # the folder stands alone
    plain = run_plain(rm, tmp_path)
    assert plain["class"] == "MyRMForTokenClassification"
    assert plain["shape"] == [len(TALKS), 1]
    assert plain["missing"] == plain["unexpected"] == []
    for side in ("right", "left"):
        assert plain["logits"][side] == pytest.approx(ours, abs=2e-5)


def test_plain_bfloat16_keeps_the_head_and_its_logits_in_float32(rm, tmp_path):
    plain = run_plain(rm, tmp_path, dtype="bfloat16")
    assert plain["head"] == plain["dtype"] == "torch.float32"


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_from_index(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_head_weight_is_fatal_by_name_natively_and_plainly(rm, tmp_path):
    broken = shutil.copytree(rm, tmp_path / "broken")
    rewrite(broken / "myrm.safetensors", lambda tensors: tensors.pop("myscore.layers.1.bias"))
    drop_from_index(broken, "myscore.layers.1.bias")
    with pytest.raises(RMError, match=r"myscore\.layers\.1\.bias"):
        RewardScorer.load(broken)
    plain = run_plain(broken, tmp_path, check=False)
    assert plain.returncode != 0
    assert "myscore.layers.1.bias" in plain.stderr


def test_a_head_weight_without_a_place_is_fatal_by_name(rm, tmp_path):
    broken = shutil.copytree(rm, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_dim_str": "16"}))
    (broken / "rm_card.json").unlink()
    with (
        pytest.warns(UserWarning, match="no rm_card.json"),
        pytest.raises(RMError, match=r"myscore\.(layers\.1\.weight|output_layer\.weight)"),
    ):
        RewardScorer.load(broken)


def test_a_head_weight_of_another_shape_is_fatal_by_name(rm, tmp_path):
    broken = shutil.copytree(rm, tmp_path / "broken")
    rewrite(broken / "myrm.safetensors", lambda t: t.update({"myscore.layers.0.weight": torch.zeros(16, 31)}))
    with pytest.raises(RMError, match=r"myscore\.layers\.0\.weight"):
        RewardScorer.load(broken)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_backbone_weight_is_fatal_by_name(rm, tmp_path, name):
    broken = shutil.copytree(rm, tmp_path / "broken")
    rewrite(broken / "model-00001-of-00001.safetensors", lambda tensors: tensors.pop(name))
    drop_from_index(broken, name)
    with pytest.raises(RMError, match=name.replace(".", r"\.")):
        RewardScorer.load(broken)


def test_a_missing_shard_is_an_error(rm, tmp_path):
    broken = shutil.copytree(rm, tmp_path / "broken")
    (broken / "myrm.safetensors").unlink()
    with pytest.raises(RMError, match=r"myrm\.safetensors"):
        RewardScorer.load(broken)


def test_shards_are_bounded_and_load_again(tmp_path):
    backbone = tiny_backbone(tmp_path / "backbone")
    rm = tiny_rm(tmp_path / "rm")
    for shard in rm.glob("model*.safetensors*"):
        shard.unlink()
    model, dropped = load_backbone(backbone)
    assert dropped == ["lm_head.weight"]
    write_weights(rm, model, {"unsafety": read_head(tiny_head(tmp_path / "head"))}, shard_bytes=30_000)
    shards = sorted(rm.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            sizes = [tensors.get_tensor(name).numel() * 4 for name in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    loaded = load_model(rm, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_temperature_is_folded_into_the_output_layer_and_noted(tmp_path):
    backbone = tiny_backbone(tmp_path / "backbone")
    merge(backbone, tiny_head(tmp_path / "t1"), tmp_path / "rm1")
    report = merge(backbone, tiny_head(tmp_path / "t2", temperature=2.5), tmp_path / "rm2")
    assert report.temperature == 2.5
    card = RMCard.read(tmp_path / "rm2")
    assert card is not None
    assert card.temperature == 2.5
    one, two = (RewardScorer.load(tmp_path / name, dtype="float32").score(TALKS) for name in ("rm1", "rm2"))
    assert [s.logit for s in two] == pytest.approx([s.logit / 2.5 for s in one], rel=1e-5)


@pytest.mark.parametrize("hidden_dim", ["'16,8'", "[16, 8]", "16,8"])
def test_the_original_form_of_a_head_gives_the_same_rm(tmp_path, hidden_dim):
    backbone, head = tiny_backbone(tmp_path / "backbone"), tmp_path / "original"
    head.mkdir()
    torch.save(head_tensors(), head / "best_model.pth")
    (head / "config.yaml").write_text(
        f"hidden_dim: {hidden_dim}\nlr: 0.001\ndata_name: saferlhf\nroot: /somewhere/else\n"
    )
    merge(backbone, head / "best_model.pth", tmp_path / "rm")
    merge(backbone, tiny_head(tmp_path / "head"), tmp_path / "rm2")
    assert (tmp_path / "rm" / "myrm.safetensors").read_bytes() == (tmp_path / "rm2" / "myrm.safetensors").read_bytes()
    card = RMCard.read(tmp_path / "rm")
    assert card is not None
    assert card.labels == "saferlhf"
    assert "/somewhere/else" not in card.to_json()


def test_a_pth_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "head").mkdir()
    torch.save({"layers.0.weight": Bomb()}, tmp_path / "head" / "best_model.pth")
    (tmp_path / "head" / "config.yaml").write_text("hidden_dim: 16\n")
    with pytest.raises(RMError, match=r"best_model\.pth"):
        read_head(tmp_path / "head")
    assert not (tmp_path / "exploded").exists()


def broken_head(folder: Path, change) -> Path:
    tiny_head(folder)
    rewrite(folder / "head.safetensors", change)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.0.bias"), r"missing \['layers\.0\.bias'\]"),
        (lambda t: t.update({"layers.2.weight": torch.zeros(1)}), r"unexpected \['layers\.2\.weight'\]"),
        (lambda t: t.update({"layers.1.weight": torch.zeros(8, 15)}), r"layers\.1\.weight has shape \(8, 15\)"),
        (lambda t: t.update({"output_layer.bias": torch.tensor([torch.nan])}), r"output_layer\.bias .* not finite"),
    ],
)
def test_a_head_that_is_not_whole_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(RMError, match=words):
        merge(tiny_backbone(tmp_path / "backbone"), broken_head(tmp_path / "head", change), tmp_path / "rm")
    assert not (tmp_path / "rm").exists()


def test_a_head_of_another_width_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(RMError, match="takes 48 numbers, the backbone gives 32"):
        merge(
            tiny_backbone(tmp_path / "backbone"), tiny_head(tmp_path / "head", hidden_size=48), tmp_path / "out" / "rm"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_only_an_rm_folder_is_replaced_and_only_when_told(tmp_path):
    """A path mistyped after --force must not cost a home folder, a policy or a checkpoint."""
    backbone, head = tiny_backbone(tmp_path / "backbone"), tiny_head(tmp_path / "head")
    out = tmp_path / "rm"
    merge(backbone, head, out)
    (out / "config.json").touch()
    with pytest.raises(RMError, match="--force to replace"):
        merge(backbone, head, out)
    merge(backbone, head, out, overwrite=True)
    RewardScorer.load(out)
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "mine.txt").write_text("dear to me")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("dear to me")
    for foreign in (out, notes, backbone, head, notes / "mine.txt"):
        before = {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file()}
        with pytest.raises(RMError, match="not replaced, not even with --force") as error:
            merge(backbone, head, foreign, overwrite=True)
        assert str(foreign) in str(error.value)
        assert {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    merge(backbone, head, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone", "empty", "head", "notes", "rm"]


@pytest.mark.parametrize("what", ["missing", "left over"])
def test_a_backbone_that_is_not_whole_is_refused(tmp_path, what):
    backbone = tiny_backbone(tmp_path / "backbone")

    def change(tensors):
        if what == "missing":
            del tensors["model.norm.weight"]
        else:
            tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)

    rewrite(backbone / "model.safetensors", change)
    with pytest.raises(RMError, match=r"norm\.weight" if what == "missing" else r"layers\.2\.mlp\.up_proj\.weight"):
        merge(backbone, tiny_head(tmp_path / "head"), tmp_path / "rm")


def test_a_head_trained_on_another_backbone_is_refused_unless_told(tmp_path):
    backbone, head = tiny_backbone(tmp_path / "backbone"), tiny_head(tmp_path / "head")
    described = json.loads((head / "head.json").read_text()) | {"backbone": "elsewhere@0123456789abcdef"}
    (head / "head.json").write_text(json.dumps(described))
    with pytest.raises(RMError, match="trained on elsewhere"):
        merge(backbone, head, tmp_path / "rm")
    merge(backbone, head, tmp_path / "rm", other_backbone=True)


def test_the_head_is_asked_as_it_was_trained(tmp_path):
    backbone, head = tiny_backbone(tmp_path / "backbone"), tiny_head(tmp_path / "head")
    described = json.loads((head / "head.json").read_text())
    described["render"] = {"bos": "none", "end_token": "<|eot_id|>", "truncation_side": "right", "max_length": 77}
    (head / "head.json").write_text(json.dumps(described))
    merge(backbone, head, tmp_path / "rm")
    policy = RewardScorer.load(tmp_path / "rm").policy
    assert (policy.bos, policy.end_token, policy.truncation_side, policy.max_length) == (
        "none",
        "<|eot_id|>",
        "right",
        77,
    )
    with pytest.raises(RMError, match="max_length is 99, but the head was trained with 77"):
        merge(backbone, head, tmp_path / "rm", max_length=99, overwrite=True)
    described["render"]["chat_template_sha256"] = "0" * 64
    (head / "head.json").write_text(json.dumps(described))
    with pytest.raises(RMError, match="chat_template_sha256"):
        merge(backbone, head, tmp_path / "rm", overwrite=True)


def test_a_backbone_without_a_template_needs_one_given(tmp_path):
    tokenizer = llama3_tokenizer(chat_template=None)
    backbone, head = tiny_backbone(tmp_path / "backbone", tokenizer=tokenizer), tiny_head(tmp_path / "head")
    with pytest.raises(RMError, match="--chat-template FILE"):
        merge(backbone, head, tmp_path / "rm")
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eot_id|>\n{% endfor %}\n"
    merge(backbone, head, tmp_path / "rm", chat_template=template)
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").chat_template == template
    assert len(RewardScorer.load(tmp_path / "rm").score(TALKS)) == len(TALKS)


def test_a_pad_token_beyond_the_embedding_does_not_stop_the_backbone(tmp_path):
    rm = tiny_rm(tmp_path / "rm")
    config = json.loads((rm / "config.json").read_text())
    (rm / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    assert len(RewardScorer.load(rm).score(TALKS)) == len(TALKS)


def test_nothing_is_registered_by_import_or_load(rm):
    script = (
        "import sys, ups_rm, ups_rm.reward.scorer as s\n"
        "assert 'torch' not in sys.modules, 'importing the scorer imports torch'\n"
        f"s.RewardScorer.load({str(rm)!r})\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert 'myrm' not in CONFIG_MAPPING\n"
        "from ups_rm.reward.native import register; register(); register()\n"
        "from transformers import AutoModelForTokenClassification as A\n"
        f"model = A.from_pretrained({str(rm)!r})\n"
        "assert type(model).__module__ == 'ups_rm.reward.myrm.modeling_myrm', type(model)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_folder(
    rm_folder: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It derives from BaseException: found by the fuzzer in a damaged tokenizer.json."""
    from transformers import AutoTokenizer

    from ups_rm.local.policy import load_model
    from ups_rm.reward.merge import load_backbone_tokenizer
    from ups_rm.reward.native import load_tokenizer

    class PanicException(BaseException):
        pass

    def panics(*_: object, **__: object) -> None:
        raise PanicException("byte index 4 is out of bounds of `a`")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panics)
    with pytest.raises(RMError, match=r"can't be loaded: .*PanicException: byte index 4"):
        load_tokenizer(rm_folder)
    with pytest.raises(RMError, match=r"can't be loaded: .*PanicException: byte index 4"):
        load_backbone_tokenizer(rm_folder, None)
    with pytest.raises(PolicyError, match=r"can't be loaded .*PanicException: byte index 4"):
        load_model(str(policy_folder), dtype=torch.float32)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(rm_folder)
