"""`ups-rm run` from rows to the table, with tiny models: what it leaves, what it skips, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_hf_rm
from tiny_training import BENIGN, UNSAFE, command, prompt_file
from ups_rm.data.check import check_parquet
from ups_rm.data.prompts import read_prompts
from ups_rm.errors import RunError
from ups_rm.pipeline.reward_model import held_out_texts, labelled_rows
from ups_rm.recipe import load_recipe
from ups_rm.tracking.group_log import read_group_log

SMALL = [
    *("trainer.total_training_steps=3", "trainer.device=cpu", "data.max_response_length=8", "reward_training.layers=1"),
    *("evaluation.max_unsafe_prompts=4", "evaluation.max_benign_prompts=4", "evaluation.max_new_tokens=8"),
]
STAGES = ["prepare", "backbone", "features", "head", "merge", "check", "train", "eval"]
RUN = Path("runs/ups-rm/quickstart")
RM = Path("merge/merged_model/Naive-RM-saferlhf")
WRITTEN_ANEW = {
    name for file in ("summary.json", "report.html", "report_sources.json") for name in (file, f".{file}.manifest.json")
}


@dataclass
class Place:
    """A working folder with `ups-rm run` in it: tiny policy, tiny backbone, few steps."""

    folder: Path
    policy: Path
    backbone: Path
    capture: Any
    out: str = ""

    def run(self, *arguments: str, **environment: str) -> int:
        """Exit code; what was printed is in `out`."""
        settings = {"POLICY_MODEL_PATH": str(self.policy), "UPS_RM_CACHE": str(self.folder / "cache"), **environment}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name in ("REWARD_MODEL_PATH", "TRAIN_DATA", "VAL_DATA", "OUTPUT_DIR", "ENGINE", "FRESH"):
                patch.delenv(name, raising=False)
            for name, value in settings.items():
                patch.setenv(name, value)
            self.capture.readouterr()
            code = command("run", f"reward_training.backbone={self.backbone}", *SMALL, *arguments)
            captured = self.capture.readouterr()
            self.out = captured.out + captured.err
        return code

    def summary(self, run: Path = RUN) -> dict[str, Any]:
        return json.loads((self.folder / run / "summary.json").read_text())  # type: ignore[no-any-return]

    @property
    def skipped(self) -> list[str]:
        lines = [line for line in self.out.splitlines() if "done before, skipped" in line]
        return [line.split()[1].rstrip(":") for line in lines]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, backbone_folder: Path
) -> tuple[Path, float, int]:
    """(folder, CPU seconds, exit code): where the whole way was gone once; copied for the tests that change it."""
    folder = tmp_path_factory.mktemp("finished")

    class Silent:
        def readouterr(self) -> Any:
            return type("Captured", (), {"out": "", "err": ""})

    started = process_time()
    code = Place(folder, policy_folder, backbone_folder, Silent()).run()
    return folder, process_time() - started, code


@pytest.fixture
def done(
    finished: tuple[Path, float, int], tmp_path: Path, policy_folder: Path, backbone_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> Place:  # fmt: skip
    shutil.copytree(finished[0], tmp_path / "place", copy_function=shutil.copy2)
    return Place(tmp_path / "place", policy_folder, backbone_folder, capsys)


@pytest.fixture
def place(tmp_path: Path, policy_folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", policy_folder, backbone_folder, capsys)


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """All that a run made once; its lock files say who ran last."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file() and "cache" not in file.parts and file.name not in WRITTEN_ANEW and file.suffix != ".lock"
    }


# ---- the whole way


def schema(value: Any) -> Any:
    return {key: schema(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value).__name__


def test_the_whole_way_in_under_a_minute(finished: tuple[Path, float, int]) -> None:
    folder, seconds, code = finished
    assert code == 0
    assert seconds < 60
    for file in ("Data/pku_saferlhf_verl/train.parquet", "Data/pku_saferlhf_verl/val.parquet", RM / "config.json",
                 RM / "rm_card.json", RUN / "policy/model.safetensors", RUN / "metrics.jsonl", RUN / "recipe.yaml",
                 RUN / "groups/step_000003.jsonl", RUN / "eval/pairs.jsonl", RUN / "summary.json",
                 RUN / "report.html"):  # fmt: skip
        assert (folder / file).is_file(), file
    assert {path.name for path in folder.iterdir()} - {"cache"} == {"Data", "merge", "runs"}


def test_summary_has_exactly_the_agreed_form(finished: tuple[Path, float, int]) -> None:
    summary = json.loads((finished[0] / RUN / "summary.json").read_text())
    pair = {"before": "float", "after": "float"}
    more = {"groups", "categories", "judges"}  # docs/evaluation.md; their figures have tests of their own
    assert schema({key: value for key, value in summary.items() if key not in more}) == {
        "safe_score": {**pair, "diff": "float", "ci95": "list", "n": "int"},
        "refusal_rate": {"unsafe": pair, "benign": pair},
        "length": pair,
        "distinct_2": pair,
        "kl": "float",
        "seconds": dict.fromkeys(STAGES, "float"),
        "steps": "int",
    }
    assert list(summary["groups"]) == ["unsafe", "benign"]
    assert {figures["n"] for figures in summary["groups"].values()} == {4}
    assert summary["judges"] == {}
    assert summary["categories"], "the sample's rows name theirs"
    assert all(1 <= figures["n"] <= 4 for figures in summary["categories"].values())
    assert summary["steps"] == 3
    score = summary["safe_score"]
    assert score["diff"] == pytest.approx(score["after"] - score["before"])
    low, high = score["ci95"]
    assert low <= score["diff"] <= high
    assert score["n"] == 8
    assert all(0 < score[when] < 1 for when in ("before", "after"))


def test_the_figures_are_those_of_the_pairs(finished: tuple[Path, float, int]) -> None:
    summary = json.loads((finished[0] / RUN / "summary.json").read_text())
    pairs = [json.loads(line) for line in (finished[0] / RUN / "eval/pairs.jsonl").read_text().splitlines()]
    recipe = load_recipe()
    assert len(pairs) == 8 * recipe.evaluation.n
    for when in ("before", "after"):
        scores = [pair[when]["safe_score"] for pair in pairs]
        assert summary["safe_score"][when] == pytest.approx(sum(scores) / len(scores))
        assert summary["length"][when] == pytest.approx(sum(pair[when]["length"] for pair in pairs) / len(pairs))
        benign = [pair[when]["refusal"] for pair in pairs if pair["kind"] == "benign"]
        assert summary["refusal_rate"]["benign"][when] == pytest.approx(sum(benign) / len(benign))


def test_no_held_out_prompt_was_trained_on(finished: tuple[Path, float, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the policy nor by the reward model, although the same prompt comes with many replies."""
    monkeypatch.chdir(finished[0])
    recipe = load_recipe()
    held_out = held_out_texts(recipe)
    trained = {sample.messages[-1]["content"] for file in (RUN / "groups").glob("step_*.jsonl")
               for sample in read_group_log(file).groups}  # fmt: skip
    assert trained
    assert not trained & held_out
    rows = labelled_rows(recipe, "sample", held_out=held_out)
    assert len(rows) > 500
    assert not {row.prompt for row in rows} & held_out
    benign = labelled_rows(recipe, "sample", held_out=held_out, benign_only=True)
    assert 0 < len(benign) < len(rows)
    with pytest.raises(RunError, match="no labelled train rows"):
        labelled_rows(recipe, "sample", held_out={row.prompt for row in rows} | held_out)


# ---- again


def test_a_second_run_skips_every_stage_and_changes_nothing(done: Place) -> None:
    before, summary = content(done.folder), done.summary()
    started = process_time()
    assert done.run() == 0
    assert process_time() - started < 15
    assert done.skipped == STAGES
    assert content(done.folder) == before
    assert done.summary() == summary
    assert "Before and after" in done.out


def test_only_what_a_change_touches_is_done_again(done: Place) -> None:
    assert done.run("evaluation.n=1") == 0
    assert done.skipped == STAGES[:-1]
    assert done.run("evaluation.n=1", "reward_training.seed=1", OUTPUT_DIR="runs/other") == 0
    assert done.skipped == ["prepare", "backbone", "features"]
    assert done.summary(Path("runs/other"))["steps"] == 3


def test_a_run_with_other_settings_never_replaces_one_unasked(done: Place) -> None:
    policy = (done.folder / RUN / "policy/model.safetensors").read_bytes()
    assert done.run("actor_rollout_ref.actor.optim.lr=1e-2") == 2
    assert "nothing is overwritten" in done.out
    assert "OUTPUT_DIR=" in done.out
    assert (done.folder / RUN / "policy/model.safetensors").read_bytes() == policy
    assert done.run("actor_rollout_ref.actor.optim.lr=1e-2", FRESH="1") == 0
    assert done.skipped == []
    assert (done.folder / RUN / "policy/model.safetensors").read_bytes() != policy


def test_a_run_goes_on_with_other_settings_where_that_is_allowed(place: Place, rm_folder: Path) -> None:
    """From its last checkpoint; what changed is listed, and noted in the checkpoints after it."""
    more = {**own(place.folder), "REWARD_MODEL_PATH": str(rm_folder)}
    lr = "actor_rollout_ref.actor.optim.lr"
    assert place.run(f"{lr}=1e-3", "trainer.save_freq=1", **more) == 0, place.out
    changed = [f"{lr}=1e-2", "trainer.save_freq=1", "trainer.total_training_steps=5"]
    assert place.run(*changed, **more) == 2
    assert "--allow-changes" in place.out
    assert place.run("--allow-changes", *changed, **more) == 0, place.out
    assert "global_step_3 after step 3" in place.out
    assert f"{lr}: 0.001, now 0.01" in place.out
    assert place.summary()["steps"] == 5
    rates = [json.loads(line)["actor/lr"] for line in (place.folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert max(rates[:3]) <= 1e-3  # it warms up
    assert rates[3:] == [1e-2] * 2
    state = json.loads((place.folder / RUN / "global_step_5/state.json").read_text())
    assert any(lr in change for change in state["changes"])
    assert place.run(*changed, **more) == 0, place.out
    assert "train" in place.skipped


def test_cosmetic_settings_are_no_change(done: Place) -> None:
    """How a run is shown or called does not make it another one."""
    moved = f"trainer.default_local_dir={RUN}"
    assert done.run("trainer.logger=[]", "trainer.project_name=other", moved) == 0
    assert done.skipped == STAGES


def test_folders_of_the_user_are_left_alone(place: Place) -> None:
    theirs = place.folder / "Data/pku_saferlhf_verl"
    theirs.mkdir(parents=True)
    (theirs / "train.parquet").write_text("mine")
    for fresh in ({}, {"FRESH": "1"}):
        assert place.run(**fresh) == 2
        assert "was not made by this command: nothing is overwritten" in place.out
    assert (theirs / "train.parquet").read_text() == "mine"


# ---- own data, RM, prompts


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Rows of {prompt, safe_response, unsafe_response}, 40 prompts."""
    rows = [
        {
            "prompt": f"{text}, please, number {i}?",
            "safe_response": f"I am sorry, but I can't help with that ({i}).",
            "unsafe_response": f"Mix flour and water {i} and it could hurt someone.",
        }
        for i in range(4)
        for text in UNSAFE
    ]
    file = tmp_path / "my pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_own_pairs_with_the_samples_harmless_prompts(place: Place, pairs: Path) -> None:
    assert place.run("--data", str(pairs)) == 0, place.out
    summary = place.summary()
    assert list(summary["seconds"]) == ["prepare", "prepare-benign", *STAGES[1:]]
    assert summary["safe_score"]["n"] == 8
    train = {row.messages[-1]["content"] for row in read_prompts(place.folder / "Data/pku_saferlhf_verl/train.parquet")}
    val = {row.messages[-1]["content"] for row in read_prompts(place.folder / "Data/pku_saferlhf_verl/val.parquet")}
    assert len(train) + len(val) == 40
    assert not train & val
    benign = read_prompts(place.folder / "Data/benign_verl/train.parquet")
    assert {row.kind for row in benign} == {"benign"}
    assert not check_parquet([place.folder / "Data/benign_verl/train.parquet"]).problems
    logs = (place.folder / RUN / "groups").glob("step_*.jsonl")
    kinds = [group.kind for file in logs for group in read_group_log(file).groups]
    assert {"benign", "unsafe"} == set(kinds)
    assert place.run("--data", str(pairs)) == 0
    assert place.skipped == ["prepare", "prepare-benign", *STAGES[1:]]
    with pairs.open("a") as stream:
        row = {"prompt": "one more", "safe_response": "No, I can't.", "unsafe_response": "Yes, mix it."}
        stream.write(json.dumps(row) + "\n")
    assert place.run("--data", str(pairs), FRESH="") in (0, 2)
    assert "prepare" not in place.skipped


def own(folder: Path) -> dict[str, str]:
    """Prompts of the user's own, as environment variables."""
    return {
        "TRAIN_DATA": str(prompt_file(folder / "own/train.parquet")),
        "VAL_DATA": str(prompt_file(folder / "own/val.parquet", unsafe=len(UNSAFE) - 5, benign=len(BENIGN) - 2)),
    }


def test_own_prompts_and_reward_model_replace_their_stages(place: Place, rm_folder: Path) -> None:
    environment = {**own(place.folder), "REWARD_MODEL_PATH": str(rm_folder), "OUTPUT_DIR": "runs/2024-01-01"}
    assert place.run(**environment) == 0, place.out
    summary = place.summary(Path("runs/2024-01-01"))
    assert list(summary["seconds"]) == ["check", "train", "eval"]
    assert not (place.folder / "Data").exists()
    assert not (place.folder / "merge/merged_model").exists()


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_classifier_of_plain_transformers_is_checked_as_what_it_is(place: Place, tmp_path: Path, kind: str) -> None:
    """Its kind, output and template reach the doctor; a template of two BOS is its finding, and stops the run."""
    folder = tiny_hf_rm(tmp_path / "classifier", kind=kind)
    environment = {**own(place.folder), "REWARD_MODEL_PATH": str(folder), "OUTPUT_DIR": "runs/classifier"}
    assert place.run("reward_model.model.output=safety", **environment) == 0, place.out
    report = json.loads((place.folder / "merge/check/rm_check.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert report["ok"] is True
    assert verdicts["last token"] in ("pass", "warn")  # asked of classifiers of plain transformers only
    assert verdicts["card"] == "skip"
    assert list(place.summary(Path("runs/classifier"))["seconds"]) == ["check", "train", "eval"]
    twice = tmp_path / "twice.jinja"
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    twice.write_text(template.replace("= bos_token + text", "= bos_token + bos_token + text"), encoding="utf-8")
    assert place.run(f"reward_model.model.template={twice}", **environment | {"OUTPUT_DIR": "runs/twice"}) == 2
    assert "double BOS" in place.out
    assert "nothing was trained" in place.out
    assert not (place.folder / "runs/twice").exists()


def test_a_function_is_checked_on_labelled_rows(place: Place) -> None:
    environment = {**own(place.folder), "OUTPUT_DIR": "runs/function"}
    given = [f"reward_model.model.callable={__name__}:refuses", "reward_model.transform=logit"]
    assert place.run(*given, "reward_model.model.output=unsafety", **environment) == 2
    assert "flipped sign" in place.out
    assert not (place.folder / "runs/function").exists()
    assert place.run(*given, "reward_model.model.output=safety", **environment) == 0, place.out
    report = json.loads((place.folder / "merge/check/rm_check.json").read_text())
    assert {check["name"]: check["verdict"] for check in report["checks"]}["direction"] == "pass"


def refuses(conversations: list[list[dict[str, str]]]) -> list[float]:
    """Whether the reply refuses, and a little by its length: higher = safer."""
    from ups_rm.evaluation.refusal import is_refusal

    replies = [messages[-1]["content"] for messages in conversations]
    return [float(is_refusal(reply)) + 1e-4 * len(reply) for reply in replies]


def test_a_run_makes_an_rm_with_two_heads_and_trains_against_both(place: Place) -> None:
    both = ("reward_training.target=both", "algorithm.objective=weighted")
    assert place.run(*both, **own(place.folder)) == 0, place.out
    assert json.loads((place.folder / RM / "config.json").read_text())["heads"] == ["unsafety", "helpfulness"]
    assert "helpfulness head after epoch" in place.out
    logs = [read_group_log(file) for file in sorted((place.folder / RUN / "groups").glob("step_*.jsonl"))]
    helpful = [sample.helpfulness for log in logs for group in log.groups for sample in group.samples]
    assert all(isinstance(number, float) for number in helpful)
    assert len(set(helpful)) > 3
    assert place.run(*both, **own(place.folder)) == 0, place.out
    assert {"head", "merge", "train"} <= set(place.skipped)


def test_a_run_makes_a_helpfulness_rm_beside_the_one_that_is_given(place: Place, rm_folder: Path) -> None:
    given = {**own(place.folder), "REWARD_MODEL_PATH": str(rm_folder)}
    assert place.run("reward_training.target=helpfulness", **given) == 0, place.out
    made = place.folder / "merge/merged_model/Helpfulness-RM"
    assert json.loads((made / "config.json").read_text())["heads"] == ["helpfulness"]
    assert not (place.folder / RM).exists()
    group = read_group_log(min((place.folder / RUN / "groups").glob("step_*.jsonl"))).groups[0]
    assert all(sample.helpfulness is not None for sample in group.samples)


@pytest.mark.parametrize("only", ["TRAIN_DATA", "VAL_DATA"])
def test_half_of_the_own_prompts_is_an_error(place: Place, only: str) -> None:
    assert place.run(**{only: own(place.folder)[only]}) == 2
    assert "TRAIN_DATA and VAL_DATA belong together" in place.out.replace("\n", " ")


def test_wrong_inputs_are_said_before_any_work(place: Place) -> None:
    for arguments, environment, message in (
        (["--data", "nowhere.jsonl"], {}, "nowhere.jsonl"),
        (["prepare.benign_source=nowhere.jsonl"], {}, "nowhere.jsonl"),
        (["reward_training.benign_source=nowhere.jsonl"], {}, "nowhere.jsonl"),
        ([], {"TRAIN_DATA": "train.parquet", "VAL_DATA": "val.parquet"}, "train.parquet: no such file"),
        ([], {"REWARD_MODEL_PATH": "nowhere"}, "nowhere is not an RM folder"),
        ([], {"POLICY_MODEL_PATH": "./nowhere"}, "no model at ./nowhere"),
        ([], {"ENGINE": "verl"}, "trainer.device=cpu: stock verl trains on GPUs"),
        ([], {"ENGINE": "ray"}, "ENGINE=ray is not known"),
        (["trainer.total_step=3"], {}, "did you mean trainer.total_"),
        (["--recipe", "slowstart"], {}, "packaged ones"),
        (["algorithm.objective=constrained"], {}, "needs a helpfulness head"),
    ):
        assert place.run(*arguments, **environment) == 2
        assert message in place.out.replace("\n", " ")
        assert "Traceback" not in place.out
        assert not (place.folder / "Data").exists()
        assert not (place.folder / "runs").exists()


@pytest.fixture
def flat_rm(rm_folder: Path, tmp_path: Path) -> Path:
    """A reward model that gives every reply the same score."""
    folder = tmp_path / "flat"
    shutil.copytree(rm_folder, folder)
    head = load_file(folder / "myrm.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in head.items()}, folder / "myrm.safetensors")
    (folder / "rm_card.json").unlink()
    return folder


@pytest.mark.filterwarnings("ignore:.*has no rm_card.json")
def test_a_reward_model_that_fails_its_check_is_not_trained_against(place: Place, flat_rm: Path) -> None:
    environment = {**own(place.folder), "REWARD_MODEL_PATH": str(flat_rm)}
    assert place.run(**environment) == 2
    assert "nothing was trained" in place.out
    assert not (place.folder / RUN).exists()
    assert place.run("--skip-rm-check", **environment) == 0, place.out
    assert place.summary()["rm_check"] == "skipped by --skip-rm-check"


def test_prompts_that_cannot_be_trained_on_stop_it(place: Place, rm_folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = place.folder / "own/broken.parquet"
    broken.parent.mkdir()
    pq.write_table(pa.table({"prompt": ["just text"], "data_source": ["x"]}), broken)
    environment = {"TRAIN_DATA": str(broken), "VAL_DATA": str(broken), "REWARD_MODEL_PATH": str(rm_folder)}
    assert place.run(**environment) == 2
    assert not (place.folder / RUN).exists()


# ---- interrupted


@pytest.fixture
def process(place: Place, rm_folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `ups-rm run` as a process of its own; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | own(place.folder) | {"REWARD_MODEL_PATH": str(rm_folder)}
        environment |= {"POLICY_MODEL_PATH": str(place.policy), "UPS_RM_CACHE": str(place.folder / "cache")}
        environment |= {"UPS_RM_NATIVE": "0"}  # they would be built anew in that cache
        command = [sys.executable, "-m", "ups_rm", "run", *SMALL, *arguments]
        started.append(
            subprocess.Popen(
                command, cwd=place.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return started[-1]

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
            child.wait()


def test_ctrl_c_exits_130_and_the_same_command_goes_on(
    place: Place, process: Callable[..., subprocess.Popen[str]], rm_folder: Path
) -> None:
    """Interrupted in the middle of the training: a checkpoint, then the rest of the steps and not one twice."""
    more = "trainer.total_training_steps=30"
    child = process(more)
    metrics, patience = place.folder / RUN / "metrics.jsonl", perf_counter() + 600
    while perf_counter() < patience and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert child.poll() is None, child.communicate()[0]
        sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=600)
    assert child.returncode == 130, out
    assert "Traceback" not in out
    [checkpoint] = (place.folder / RUN).glob("global_step_*")
    stopped = int(checkpoint.name.rsplit("_", 1)[1])
    assert 3 <= stopped < 30
    assert not (place.folder / RUN / "policy").exists()
    assert place.run(more, **own(place.folder), REWARD_MODEL_PATH=str(rm_folder)) == 0, place.out
    assert "resumed from" in place.out
    assert place.skipped == ["check"]
    assert place.summary()["steps"] == 30
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_an_alarm_that_stops_exits_3_and_the_same_command_goes_on(place: Place, rm_folder: Path) -> None:
    """The stage is left unfinished, with checkpoint and policy; then the rest, all of it told as events."""
    more = ["trainer.total_training_steps=4", "monitor.window=1", "monitor.kl=1e-7", "monitor.stop_on=[kl_runaway]",
            "algorithm.kl_penalty=abs", "--json"]  # fmt: skip
    assert place.run(*more, **own(place.folder), REWARD_MODEL_PATH=str(rm_folder)) == 3, place.out
    events = [json.loads(line) for line in place.out.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events][-1] == "alarm"
    stopped = events[-1]["step"]
    assert 1 <= stopped < 4
    assert (place.folder / RUN / f"global_step_{stopped}").is_dir()
    assert (place.folder / RUN / "policy").is_dir()
    assert not (place.folder / RUN / "summary.json").exists()
    assert place.run(*more, **own(place.folder), REWARD_MODEL_PATH=str(rm_folder)) == 0, place.out
    events = [json.loads(line) for line in place.out.splitlines() if line.startswith("{")]
    told = [(event["event"], event.get("name", event.get("step"))) for event in events if event["event"] != "alarm"]
    assert told == [
        ("stage", "check"), *(("step", i) for i in range(stopped + 1, 5)), ("stage", "train"), ("stage", "eval"),
        ("summary", None),
    ]  # fmt: skip
    assert [event["skipped"] for event in events if event["event"] == "stage"] == [True, False, False]
    assert events[-1]["steps"] == 4
    assert events[-1]["safe_score"] == place.summary()["safe_score"]
