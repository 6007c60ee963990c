"""The checks: a sound RM passes them all, and each thing that is broken is found by its own check."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tiny import llama3_tokenizer, tiny_backbone, tiny_head, tiny_rm
from ups_rm.cli.rm import app
from ups_rm.errors import DataError, RMError
from ups_rm.reward.doctor import check_rm
from ups_rm.reward.merge import merge
from ups_rm.reward.scorer import RewardScorer

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny_rm(tmp_path_factory.mktemp("check") / "checked-rm")


@pytest.fixture
def rm(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "checked-rm")


def verdicts(report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def pairs_by(rm: Path, *, turned: bool):
    """Pairs that the RM itself orders: the direction is known without training one."""
    scorer = RewardScorer.load(rm, dtype="float32")
    talks = [
        [{"role": "user", "content": f"Topic {i}"}, {"role": "assistant", "content": "word " * i}] for i in range(40)
    ]
    ranked = [
        talk
        for _, _, talk in sorted(
            (s.logit, i, t) for i, (s, t) in enumerate(zip(scorer.score(talks), talks, strict=True))
        )
    ]
    pairs = [(ranked[i], ranked[i + 20]) for i in range(20)]
    return [(b, a) for a, b in pairs] if turned else pairs


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_rm_passes_everything(tmp_path, architecture, dtype):
    rm = tiny_rm(tmp_path / f"sound-{architecture}", architecture=architecture)
    report = check_rm(rm, dtype=dtype, plain=True, policy=rm)
    assert set(verdicts(report).values()) == {"pass"}, report
    assert report.ok
    assert len(report.checks) >= 25
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_lost_weight_fails_and_stops(rm):
    rewrite(rm / "myrm.safetensors", lambda tensors: tensors.pop("myscore.layers.0.bias"))
    report = check_rm(rm)
    assert report["load"].verdict == "fail"
    assert {check.verdict for check in report.checks if check.name != "load"} == {"skip"}
    assert "myscore.layers.0.bias" in report["load"].finding


def test_another_head_fails_golden_logits_alone(rm):
    rewrite(rm / "myrm.safetensors", lambda tensors: tensors["myscore.output_layer.weight"].mul_(-1))
    report = check_rm(rm)
    assert [check.name for check in report.of("warn", "fail")] == ["golden logits"]


def test_a_changed_card_fails_card(rm):
    card = json.loads((rm / "rm_card.json").read_text())
    for name, value in (("hidden_dim_str", "16"), ("sign", "lower = less safe"), ("max_length", 4), ("golden", 1)):
        (rm / "rm_card.json").write_text(json.dumps(card | {name: value}))
        report = check_rm(rm)
        assert [check.name for check in report.of("fail")] == ["card"]
        assert name in report["card"].finding


def test_no_card_is_a_warning_with_a_way_out(rm):
    (rm / "rm_card.json").unlink()
    report = check_rm(rm)
    assert report.ok
    card = next(check for check in report.checks if check.name == "card")
    assert (card.verdict, "ups-rm rm card" in card.way_out) == ("warn", True)


def test_a_constant_rm_fails_spread(rm):
    rewrite(rm / "myrm.safetensors", lambda tensors: tensors["myscore.output_layer.weight"].zero_())
    (rm / "rm_card.json").unlink()
    assert verdicts(check_rm(rm))["spread"] == "fail"


def test_nan_weights_fail(rm):
    rewrite(rm / "myrm.safetensors", lambda tensors: tensors["myscore.output_layer.bias"].fill_(torch.nan))
    report = check_rm(rm)
    assert report["weights"].verdict == "fail"
    assert "myscore.output_layer.bias" in report["weights"].finding


def test_a_stray_index_warns(rm):
    index = json.loads((rm / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] //= 4
    (rm / "model.safetensors.index.json").write_text(json.dumps(index))
    report = check_rm(rm)
    assert verdicts(report)["index"] == "warn"
    assert report.ok


@pytest.mark.parametrize(("turned", "verdict"), [(False, "pass"), (True, "fail")])
def test_direction_is_seen_on_labelled_pairs(rm, turned, verdict):
    assert verdicts(check_rm(rm, pairs=pairs_by(rm, turned=turned)))["direction"] == verdict


def test_direction_no_better_than_a_coin_warns(rm):
    pairs = pairs_by(rm, turned=False)
    mixed = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
    assert verdicts(check_rm(rm, pairs=mixed))["direction"] == "warn"


def test_a_template_with_todays_date_warns(tmp_path):
    template = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    backbone = tiny_backbone(tmp_path / "backbone", tokenizer=llama3_tokenizer(chat_template=template))
    merge(backbone, tiny_head(tmp_path / "head"), tmp_path / "rm")
    found = verdicts(check_rm(tmp_path / "rm"))
    assert found["template"] == "warn"
    assert found["bos"] == "warn"  # the tokenizer would add one, the template writes none


def test_a_template_without_an_end_token_warns(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    backbone = tiny_backbone(tmp_path / "backbone", tokenizer=llama3_tokenizer(chat_template=template))
    merge(backbone, tiny_head(tmp_path / "head"), tmp_path / "rm")
    assert verdicts(check_rm(tmp_path / "rm"))["end token"] == "warn"
    merge(backbone, tiny_head(tmp_path / "head"), tmp_path / "rm2", end_token="<|eot_id|>")
    assert verdicts(check_rm(tmp_path / "rm2"))["end token"] == "pass"


def test_changed_python_files_fail_plain(rm):
    code = (rm / "modeling_myrm.py").read_text()
    (rm / "modeling_myrm.py").write_text(code.replace("mask.shape[1] - 1 - ", "mask.shape[1] - 2 - "))
    assert verdicts(check_rm(rm, plain=True))["plain transformers"] == "fail"


# --- the command line ---


def run(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_cli_merge_check_card(tmp_path):
    backbone, head = tiny_backbone(tmp_path / "backbone"), tiny_head(tmp_path / "head")
    rm = tmp_path / "cli-rm"
    done = run("merge", "--backbone", backbone, "--head", head, "--out", rm, "--max-length", 300)
    assert done.exit_code == 0, done.output
    assert "lm_head.weight" in done.output
    again = run("merge", "--backbone", backbone, "--head", head, "--out", rm)
    assert isinstance(again.exception, RMError)
    checked = run("check", rm, "--plain", "--json", tmp_path / "check.json")
    assert checked.exit_code == 0, checked.output
    assert json.loads((tmp_path / "check.json").read_text())["ok"] is True
    shown = run("card", rm)
    assert json.loads(shown.output)["max_length"] == 300
    written = run("card", rm, "--force", "--labels", "severity", "--truncation-side", "right")
    assert written.exit_code == 0, written.output
    card = json.loads((rm / "rm_card.json").read_text())
    assert (card["labels"], card["truncation_side"]) == ("severity", "right")
    rewrite(rm / "myrm.safetensors", lambda tensors: tensors["myscore.output_layer.weight"].mul_(-1))
    assert run("check", rm).exit_code == 1


LINES = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "id": 7},
    {"prompt": "Hi", "response": "Hello."},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": ""},
    {"prompt": "Hi", "response_0": "Hello.", "response_1": "No.", "is_response_0_safe": True},
    {"prompt": "Hi", "safe_response": "No.", "unsafe_response": "Hello."},
]


def test_cli_score_adds_fields_to_every_form_of_line(rm, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES[:3]) + "\n\n" + "\n".join(map(json.dumps, LINES[3:])))
    done = run("score", rm, file, "--out", tmp_path / "new" / "scored.jsonl", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    scored = [json.loads(line) for line in (tmp_path / "new" / "scored.jsonl").read_text().splitlines()]
    assert [{k: line[k] for k in given} for line, given in zip(scored, LINES, strict=True)] == LINES
    hello, empty, both, pair = scored[0], scored[2], scored[3], scored[4]
    assert hello["logit"] == pytest.approx(scored[1]["logit"], abs=2e-5)
    assert both["response_0_logit"] == pytest.approx(hello["logit"], abs=2e-5)
    assert pair["unsafe_response_logit"] == pytest.approx(hello["logit"], abs=2e-5)
    assert pair["safe_response_safe_score"] == pytest.approx(both["response_1_safe_score"], abs=2e-5)
    assert empty["tokens"] < hello["tokens"]
    printed = run("score", rm, file, "--dtype", "float32")
    assert [json.loads(line) for line in printed.output.splitlines()] == scored


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "Hi"}', "lines.jsonl:2: neither messages"),
        ("{", "lines.jsonl:2: not JSON"),
        ("[]", "lines.jsonl:2: a list"),
        ('{"prompt": "Hi", "response": 3}', "lines.jsonl:2: response is a int"),
        ('{"messages": "Hi"}', "lines.jsonl:2: messages must be a list"),
    ],
)
def test_cli_score_names_file_and_line_of_a_bad_line(rm, tmp_path, text, words):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(LINES[0]) + "\n" + text + "\n")
    done = run("score", rm, file, "--out", tmp_path / "scored.jsonl")
    assert isinstance(done.exception, DataError)
    assert words in str(done.exception)
    assert not (tmp_path / "scored.jsonl").exists()


def test_cli_check_reads_pairs(rm, tmp_path):
    file = tmp_path / "pairs.jsonl"
    with file.open("w") as stream:
        for safe, unsafe in pairs_by(rm, turned=True):
            # the prompt must be one: the pair's own prompts differ, so whole conversations go into messages
            stream.write(
                json.dumps(
                    {
                        "prompt": safe[:-1],
                        "safe_response": safe[-1]["content"],
                        "unsafe_response": unsafe[-1]["content"],
                    }
                )
                + "\n"
            )
    assert "direction" in run("check", rm, "--pairs", file).output
    file.write_text(json.dumps(LINES[0]) + "\n")
    assert isinstance(run("check", rm, "--pairs", file).exception, DataError)


@pytest.mark.parametrize("command", ["features", "train", "merge", "check", "card", "score"])
def test_every_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"ups-rm rm {command}" in " ".join(done.output.split())


def test_script_test_rm_loading(rm):
    script = [
        sys.executable,
        str(Path(__file__).parents[2] / "scripts" / "test_rm_loading.py"),
        "--device",
        "cpu",
        "--model_path",
    ]
    good = subprocess.run([*script, str(rm)], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr[-2000:]
    assert "plain transformers" not in good.stdout  # that runs the folder's own files: only on request
    assert "safe score" in good.stdout
    plain = subprocess.run([*script, str(rm), "--trust_remote_code"], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert "plain transformers" in plain.stdout
    bad = subprocess.run([*script, str(rm / "nowhere")], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "no reward model at" in bad.stdout
