"""Planted faults: into copies of an RM with which nothing is wrong; the doctor names that fault and only that one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_judge import rewrite

from tiny import QWEN_TEMPLATE, qwen_tokenizer
from ups_rm.reward.card import write_card
from ups_rm.reward.doctor import CheckReport, check_rm

BOS = "set text = bos_token + text"


@dataclass(frozen=True)
class Fault:
    """A change to an RM folder, and the one check that must tell of it, with which verdict and words.

    new_card: the folder got its card after the change, so that the card knows nothing of the sound RM.
    """

    plant: Callable[[Path], None]
    check: str
    verdict: str
    words: str
    new_card: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change(*prefixes: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Applies `by` to the tensors whose names begin so."""

    def plant(folder: Path) -> None:
        rewrite(folder, {name: by(t) for name, t in tensors(folder).items() if name.startswith(prefixes)})

    return plant


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replaces text in a file of the folder; it must be there."""

    def plant(folder: Path) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")

    return plant


def configure(file: str, **values: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        old = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(old | values), encoding="utf-8")

    return plant


def random_head(folder: Path) -> None:
    """As torch makes new linear layers."""
    generator = torch.Generator().manual_seed(11)
    fresh = {}
    for name, tensor in tensors(folder).items():
        if name.startswith("myscore."):
            inputs = tensors(folder)[name.replace("bias", "weight")].shape[1]
            fresh[name] = (torch.rand(tensor.shape, generator=generator) * 2 - 1) / inputs**0.5
    rewrite(folder, fresh)


def as_transformers_initialises(folder: Path) -> None:
    """A head that was missing from the checkpoint: normal weights, no biases."""
    deviation = json.loads((folder / "config.json").read_text())["initializer_range"]
    generator = torch.Generator().manual_seed(12)
    head = {name: tensor for name, tensor in tensors(folder).items() if name.startswith("myscore.")}
    fresh = {n: torch.randn(t.shape, generator=generator) * deviation * n.endswith("weight") for n, t in head.items()}
    rewrite(folder, fresh)


def lose_layer(folder: Path) -> None:
    head = {name: t for name, t in load_file(folder / "myrm.safetensors").items() if ".layers.1." not in name}
    save_file(head, folder / "myrm.safetensors", metadata={"format": "pt"})


def float16(folder: Path) -> None:
    """Everything that writes into the stream between layers times 40,000: RMSNorm takes it out again, float16 can't."""
    writers = ("model.embed_tokens", "o_proj.weight", "down_proj.weight")
    for file in folder.glob("model-*.safetensors"):
        stored = load_file(file)
        loud = {n: t * 4e4 if any(part in n for part in writers) else t for n, t in stored.items()}
        save_file({n: t.half().contiguous() for n, t in loud.items()}, file, metadata={"format": "pt"})
    correct_index(folder)
    configure("config.json", dtype="float16", rms_norm_eps=1e-5 * 1.6e9)(folder)


def float16_file(folder: Path) -> None:
    """Saved in float16 although a weight is larger than that holds."""
    change("model.layers.0.mlp.up_proj", by=lambda t: (t * 1e6).half().float())(folder)


def other_tokenizer(folder: Path) -> None:
    other = qwen_tokenizer()
    other.add_special_tokens({"bos_token": "<|im_start|>"})
    other.chat_template = None
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    other.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def correct_index(folder: Path) -> None:
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors(folder).values())
    configure("model.safetensors.index.json", metadata={"total_size": total})(folder)


def short_vocabulary(folder: Path) -> None:
    """The last 20 tokens of the tokenizer have no row: what growing the tokenizer without the embedding comes to."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"] - 20
    for file in folder.glob("model-*.safetensors"):
        stored = load_file(file)
        cut = {n: t[:rows].contiguous() if "embed_tokens" in n else t for n, t in stored.items()}
        save_file(cut, file, metadata={"format": "pt"})
    correct_index(folder)
    configure("config.json", vocab_size=rows)(folder)


READS = "index = last_attended_index(attention_mask).to(hidden.device)"
BY_COUNT = "index = attention_mask.sum(dim=1).to(hidden.device) - 1"
PAD = "pad = backbone.config.pad_token_id if backbone.config.pad_token_id is not None else backbone.config.eos_token_id"
BY_ID = f"{PAD}; index = last_attended_index((input_ids != pad).long()).to(hidden.device)"
OWN_CODE = {"trust_remote_code": True}

FAULTS = {
    "flipped sign": Fault(
        change("myscore.output_layer", by=torch.neg), "direction", "fail", "flipped sign", new_card=True
    ),
    "double BOS": Fault(
        edit("chat_template.jinja", BOS, "set text = bos_token + bos_token + text"), "bos", "fail",
        "double BOS", new_card=True
    ),
    "missing BOS": Fault(
        edit("chat_template.jinja", BOS, "set text = text"), "bos", "warn", "missing BOS", new_card=True
    ),
    "missing BOS, in the tokenizer": Fault(
        configure("tokenizer_config.json", bos_token=None), "bos token", "fail", "missing BOS"
    ),
    "random head": Fault(random_head, "head", "fail", "random head"),
    "random head, with a card of its own": Fault(random_head, "head", "fail", "random head", new_card=True),
    "head that was re-initialised": Fault(as_transformers_initialises, "head", "fail", "random head"),
    "another head": Fault(
        change("myscore.layers.0.weight", by=lambda t: t.flip(0)), "golden logits", "fail", "golden["
    ),
    "one head layer missing": Fault(lose_layer, "load", "fail", "myscore.layers.1.bias"),
    "end token lost": Fault(
        edit("chat_template.jinja", "| trim + '<|eot_id|>'", "| trim"), "end token", "warn",
        "end token lost", new_card=True
    ),
    "wrong chat template": Fault(
        edit("chat_template.jinja", "m['role'] +", "m['role'] | upper +"), "chat template", "fail",
        "another chat template"
    ),
    "chat template of another model": Fault(
        lambda folder: (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE) and None,
        "chat template",
        "fail",
        "cuts into",
        new_card=True,
    ),
    "left-padding bug in remote code": Fault(
        edit("modeling_myrm.py", READS, BY_COUNT), "left padding", "fail", "left padding against none", options=OWN_CODE
    ),
    "pad == eos bug in remote code": Fault(
        edit("modeling_myrm.py", READS, BY_ID), "padding id", "fail", "pad == eos", options=OWN_CODE
    ),
    "float16 overflow inside": Fault(float16, "number range", "warn", "overflows at model.", new_card=True),
    "float16 overflow in the file": Fault(float16_file, "weights", "fail", "not finite"),
    "tokenizer of another model": Fault(other_tokenizer, "tokenizer", "fail", "tokenizer of another model"),
    "vocabulary shorter than the tokenizer": Fault(short_vocabulary, "vocabulary", "fail", "20 of the tokenizer's"),
    "saturated logits": Fault(
        change("myscore.output_layer", by=lambda t: t * 100), "saturation", "fail", "saturated logits", new_card=True
    ),
}  # fmt: skip


def examine(folder: Path, judge: Path, **options: Any) -> CheckReport:
    return check_rm(folder, data=judge.parent / "pairs.jsonl", **options)


def complaints(report: CheckReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.of("warn", "fail")}


@pytest.mark.parametrize("options", [{}, OWN_CODE], ids=["our code", "its own code"])
def test_a_sound_rm_is_given_no_fail_and_no_warning(judge: Path, options: dict[str, bool], tmp_path: Path) -> None:
    report = examine(judge, judge, plain=True, policy=judge, plot=tmp_path / "reliability.png", **options)
    assert complaints(report) == {}
    assert [check.name for check in report.of("skip")] == []
    assert len(report.checks) >= 35
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is True


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_named_and_only_that_one(judge: Path, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    folder = shutil.copytree(judge, tmp_path / name.replace(" ", "-"))
    fault.plant(folder)
    if fault.new_card:
        write_card(folder, **fault.options)
    report = examine(folder, judge, **fault.options)
    assert complaints(report) == {fault.check: fault.verdict}, report[fault.check]
    found = report[fault.check]
    assert fault.words in found.finding
    assert found.way_out
    assert report.ok == (fault.verdict == "warn")
    assert all(
        check.details.get("because_of") in (None, fault.check)
        for check in report.of("skip")
        if check.name != "policy tokenizer"
    )
