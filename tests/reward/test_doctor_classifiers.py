"""The doctor on classifiers of plain transformers: sound ones pass, and a planted fault is named, and only that one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_doctor_faults import BOS, Fault, complaints, configure, edit, examine
from tiny_judge import tiny_classifier
from typer.testing import CliRunner

from tiny import llama3_tokenizer, qwen_tokenizer, tiny_encoder_rm, tiny_hf_rm
from ups_rm.cli.rm import app
from ups_rm.errors import RMError
from ups_rm.reward.doctor import check_rm

NO_CARD = {"card", "golden logits"}


@pytest.fixture(scope="session")
def classifiers(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("classifiers")
    return {kind: tiny_classifier(judge, here / kind, kind=kind) for kind in ("sequence", "token")}


def change(prefix: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Applies `by` to the tensors whose names begin so."""

    def plant(folder: Path) -> None:
        file = folder / "model.safetensors"
        stored = load_file(file)
        assert any(name.startswith(prefix) for name in stored)
        new = {name: by(t).contiguous() if name.startswith(prefix) else t for name, t in stored.items()}
        save_file(new, file, metadata={"format": "pt"})

    return plant


def drawn_head(folder: Path) -> None:
    """A language model that was loaded as a classifier, which draws a head at random, and saved."""
    shutil.rmtree(folder)
    tiny_hf_rm(folder, seed=5, tokenizer=llama3_tokenizer(pad_token="<|end_of_text|>"))


def lose_head(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith("score.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def short_vocabulary(folder: Path) -> None:
    """The last 20 tokens of the tokenizer have no row."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"] - 20
    change("model.embed_tokens", lambda t: t[:rows])(folder)
    configure("config.json", vocab_size=rows)(folder)


def pad_is_end(folder: Path) -> None:
    """The token that ends a reply is the padding id too."""
    end = llama3_tokenizer().convert_tokens_to_ids("<|eot_id|>")
    configure("config.json", pad_token_id=end)(folder)
    configure("tokenizer_config.json", pad_token="<|eot_id|>")(folder)


def no_pad_id(folder: Path) -> None:
    pad_is_end(folder)
    configure("config.json", pad_token_id=None)(folder)


def own_forward(folder: Path) -> None:
    """Code of the folder's own that does more than a linear head on the last token."""
    (folder / "modeling_squared.py").write_text(
        "from transformers import LlamaForSequenceClassification\n\n\n"
        "class Squared(LlamaForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        answer = super().forward(*args, **kwargs)\n"
        "        answer.logits = answer.logits**3\n"
        "        return answer\n"
    )
    configure("config.json", auto_map={"AutoModelForSequenceClassification": "modeling_squared.Squared"})(folder)


FAULTS = {
    "flipped sign": (
        "sequence",
        Fault(lambda folder: None, "direction", "fail", "flipped sign", options={"output": "safety"}),
    ),
    "flipped sign of a token classifier": (
        "token", Fault(change("score.", torch.neg), "direction", "fail", "flipped sign")
    ),
    "reward that is unsafety": (
        "token", Fault(lambda folder: None, "direction", "fail", "flipped sign", options={"output": "reward"})
    ),
    "re-initialised head": ("sequence", Fault(drawn_head, "head", "fail", "random head")),
    "head missing": ("sequence", Fault(lose_head, "load", "fail", "missing: score.weight")),
    "head missing of a token classifier": ("token", Fault(lose_head, "load", "fail", "score.bias, score.weight")),
    "pad == eos": ("sequence", Fault(pad_is_end, "last token", "warn", "pad == eos bug: the pad id")),
    "pad == eos without pad id": ("sequence", Fault(no_pad_id, "last token", "warn", "config.json has no pad id")),
    "double BOS": (
        "sequence",
        Fault(edit("chat_template.jinja", BOS, "set text = bos_token + bos_token + text"), "bos", "fail", "double BOS"),
    ),
    "missing BOS": (
        "token", Fault(edit("chat_template.jinja", BOS, "set text = text"), "bos", "warn", "missing BOS")
    ),
    "vocabulary shorter than the tokenizer": (
        "sequence", Fault(short_vocabulary, "vocabulary", "fail", "20 of the tokenizer's")
    ),
    "saturated logits": (
        "sequence", Fault(change("score.", lambda t: t * 100), "saturation", "fail", "saturated logits")
    ),
    "weights that are not finite": (
        "token", Fault(change("model.norm", lambda t: t * torch.nan), "weights", "fail", "not finite")
    ),
    "a forward of its own": (
        "sequence",
        Fault(own_forward, "last token", "fail", "answers differently", options={"trust_remote_code": True}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_of_a_classifier_is_named_and_only_that_one(
    judge: Path, classifiers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, fault = FAULTS[name]
    folder = shutil.copytree(classifiers[kind], tmp_path / "rm")
    fault.plant(folder)
    report = examine(folder, judge, **fault.options)
    assert complaints(report) == {fault.check: fault.verdict}, report[fault.check]
    found = report[fault.check]
    assert fault.words in found.finding
    assert found.way_out
    assert "rm card" not in found.way_out, "a card is no way out for a folder without one"
    assert "rm merge" not in found.way_out or fault.check == "load"


def test_a_lost_end_token_is_noticed_without_data(classifiers: dict[str, Path], tmp_path: Path) -> None:
    """With data its direction may fail besides: the token that is read then is one that the head never saw."""
    folder = shutil.copytree(classifiers["sequence"], tmp_path / "rm")
    edit("chat_template.jinja", "| trim + '<|eot_id|>'", "| trim")(folder)
    report = check_rm(folder)
    assert complaints(report) == {"end token": "warn"}
    assert "reward_model.model.template" in report["end token"].way_out


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_sound_classifier_is_given_no_fail_and_no_warning(
    judge: Path, classifiers: dict[str, Path], kind: str
) -> None:
    report = examine(classifiers[kind], judge, policy=judge)
    assert complaints(report) == {}
    skipped = report.of("skip")
    assert {check.name for check in skipped} == NO_CARD
    assert report["direction"].number > 0.9
    assert "--output" in report["card"].way_out


@pytest.mark.parametrize("output", ["safety", "reward"])
def test_a_classifier_of_the_other_sign_is_sound_when_output_says_so(
    judge: Path, classifiers: dict[str, Path], tmp_path: Path, output: str
) -> None:
    folder = shutil.copytree(classifiers["sequence"], tmp_path / "rm")
    change("score.", torch.neg)(folder)
    report = examine(folder, judge, output=output)
    assert complaints(report) == {}
    same = examine(classifiers["sequence"], judge)
    assert report["direction"].number == pytest.approx(same["direction"].number)
    assert (report["calibration"].verdict == "skip") == (output == "reward")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fast_part_passes_for_untouched_folders_of_transformers(
    tmp_path: Path, architecture: str, kind: str, dtype: str
) -> None:
    tokenizer = qwen_tokenizer() if architecture == "qwen2" else llama3_tokenizer(pad_token="<|end_of_text|>")
    report = check_rm(
        tiny_hf_rm(tmp_path / "rm", kind=kind, architecture=architecture, tokenizer=tokenizer), dtype=dtype
    )
    assert complaints(report) == {}
    assert {check.name for check in report.of("skip")} == NO_CARD | {"policy tokenizer"}
    assert report["last token"].verdict == "pass"


def test_an_encoder_that_joins_pairs_is_examined_as_far_as_it_goes(judge: Path, tmp_path: Path) -> None:
    report = check_rm(tiny_encoder_rm(tmp_path / "rm"))
    assert complaints(report) == {}
    assert {check.name for check in report.of("skip")} >= {"chat template", "bos", "end token", "left padding"}
    assert report["right padding"].verdict == "pass"


def test_labels_tell_that_an_rm_was_trained_where_transformers_reads(judge: Path, tmp_path: Path) -> None:
    """Trained with pad == eos: on the token before the end token. There alone its numbers mean anything."""
    folder = tiny_classifier(judge, tmp_path / "rm", reads=-2)
    pad_is_end(folder)
    report = examine(folder, judge)
    assert complaints(report) == {"last token": "fail"}
    details = report["last token"].details
    assert details["auc_of_its_own_forward"] > 0.8 > 0.7 > details["auc"]


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [(2, "sequence", "has 2 labels (LABEL_0, LABEL_1), a reward model has one"),
     (1, "causal", "architecture LlamaForCausalLM is no reward model that is known here")],
)  # fmt: skip
def test_what_is_no_reward_model_fails_at_load_and_is_told_what_is(
    tmp_path: Path, labels: int, kind: str, words: str
) -> None:
    report = check_rm(tiny_hf_rm(tmp_path / "rm", kind=kind, labels=labels))
    assert complaints(report) == {"load": "fail"}
    assert words in report["load"].finding
    assert "kind=function" in report["load"].way_out


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [("rm", {"kind": "http"}, "kind is 'http': rm can be myrm, pairwise, sequence, token"),
     ("rm", {"output": "good"}, "output is 'good'")],
)  # fmt: skip
def test_what_the_doctor_does_not_read_is_told(given: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RMError, match=words):
        check_rm(Path(given), **options)


def test_cli_takes_kind_and_output(judge: Path, classifiers: dict[str, Path], tmp_path: Path) -> None:
    given = ["check", str(classifiers["sequence"]), "--data", str(judge.parent / "pairs.jsonl"), "--seconds", "5"]
    right = CliRunner().invoke(app, [*given, "--kind", "sequence", "--json", "-"])
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["ok"] is True
    flipped = CliRunner().invoke(app, [*given, "--output", "safety"], env={"COLUMNS": "200"})
    assert flipped.exit_code == 1
    assert "direction" in flipped.output
    assert "direction: say what its number means" in flipped.output
