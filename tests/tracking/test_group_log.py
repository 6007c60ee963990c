"""The group log: everything that was said and every number behind it, exactly."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_batches import EDGE_CASES, Batch, batches
from ups_rm.durable import write_text
from ups_rm.errors import DataError
from ups_rm.grpo import PER_REPLY, estimate_advantages
from ups_rm.tracking import GroupLog, GroupRecord, SampleRecord, group_records, read_group_log
from ups_rm.tracking.group_table import Query, write_parquet
from ups_rm.types import Message, Score

REPO = Path(__file__).resolve().parents[2]
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
TEXTS = ["Ja, gern.", "", "line one\nline two\u2028three", "引号“和”表情 🙂", '{"step": 1}', "nul\x00"]


def groups_of(batch: Batch, scale_by_std: bool = True, name: str = "grpo") -> tuple[list[GroupRecord], torch.Tensor]:
    """Records of a float32 batch, and the advantages that training would use."""
    batch = batch.to(torch.float32)
    advantages = estimate_advantages(
        name, batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std
    )
    count = len(batch.mask)
    ids = batch.group_ids.tolist()
    records = group_records(
        group_ids=batch.group_ids,
        prompt_ids=[f"prompt-{g}" for g in ids],
        messages=[[Message(role="user", content=f"{TEXTS[g % len(TEXTS)]} {g}?")] for g in ids],
        responses=[TEXTS[i % len(TEXTS)] for i in range(count)],
        scores=[Score(1.5 - i, float(batch.safe_score[i]), 10, False) for i in range(count)],
        token_level_rewards=batch.token_level_rewards,
        advantages=advantages,
        response_mask=batch.mask,
        kl=batch.logprobs - batch.ref_logprobs,
        truncated=batch.mask.sum(-1) == batch.mask.shape[1],
        kinds=["unsafe" if g % 2 else "benign" for g in ids],
    )
    return records, advantages


@given(batch=batches(), scale_by_std=st.booleans(), max_groups=st.integers(-1, 3), max_samples=st.integers(-1, 3))
@patient
def test_advantages_recompute_exactly_from_the_file(
    tmp_path: Path, batch: Batch, scale_by_std: bool, max_groups: int, max_samples: int
) -> None:
    """Bit for bit, and also where the file keeps only some of the groups and of their replies."""
    records, advantages = groups_of(batch, scale_by_std)
    log = GroupLog(tmp_path, max_groups=max_groups, max_samples_per_group=max_samples, scale_by_std=scale_by_std)
    file = log.write(3, records)
    assert file is not None
    read = read_group_log(file)
    logged = [[sample.advantage for sample in group.samples] for group in read.groups]
    assert read.recompute_advantages() == logged

    used = advantages.abs().amax(-1) * advantages.sum(-1).sign()  # one value per sequence
    by_group: dict[str, list[float]] = {}
    for group, value in zip(batch.group_ids.tolist(), used.tolist(), strict=True):
        by_group.setdefault(f"prompt-{group}", []).append(value)
    for group in read.groups:
        expected = by_group[str(group.prompt_id)]
        assert group.n == len(expected)
        assert [sample.advantage for sample in group.samples] == expected[: len(group.samples)]
    assert read.groups_total == len(by_group)
    assert len(read.groups) == (len(by_group) if max_groups <= 0 else min(max_groups, len(by_group)))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    records, _ = groups_of(EDGE_CASES["empty response"])
    file = GroupLog(tmp_path, kl_coef=0.1).write(12, records)
    assert file == tmp_path / "step_000012.jsonl"
    read = read_group_log(file)
    assert (read.step, read.kl_coef, read.adv_estimator) == (12, 0.1, "grpo")
    assert [group.samples for group in read.groups] == [group.samples for group in records]
    assert [group.messages for group in read.groups] == [group.messages for group in records]
    assert [group.kind for group in read.groups] == ["benign", "unsafe"]
    empty = read.groups[0].samples[1]
    assert (empty.length, empty.reward, empty.advantage, empty.truncated) == (0, 0.0, 0.0, False)


def test_the_kl_of_a_reply_is_what_its_reward_lost(tmp_path: Path) -> None:
    sample = groups_of(EDGE_CASES["hole in the mask"])[0][0].samples[0]
    batch = EDGE_CASES["hole in the mask"].to(torch.float32)
    kl = ((batch.logprobs - batch.ref_logprobs) * batch.mask)[0].sum()
    assert sample.kl == pytest.approx(float(kl), abs=1e-6)
    assert sample.length == 3


def test_lines_are_readable_json_with_the_text_as_it_is(tmp_path: Path) -> None:
    file = GroupLog(tmp_path).write(1, groups_of(EDGE_CASES["empty response"])[0])
    assert file is not None
    text = file.read_text(encoding="utf-8")
    assert "引号“和”表情 🙂" in text
    header, *groups = [json.loads(line) for line in text.split("\n")[:-1]]
    assert header["schema"] == "ups-rm group log 1"
    assert len(groups) == header["groups_total"] == 2


def with_manifests(*names: str) -> list[str]:
    return sorted([*names, *(f".{name}.manifest.json" for name in names)])


def test_only_every_freq_th_step_is_written(tmp_path: Path) -> None:
    records, _ = groups_of(EDGE_CASES["one reply in all"])
    log = GroupLog(tmp_path, freq=5)
    assert [step for step in range(1, 12) if log.write(step, records)] == [5, 10]
    assert sorted(file.name for file in tmp_path.iterdir()) == with_manifests("step_000005.jsonl", "step_000010.jsonl")
    assert GroupLog(tmp_path, freq=0).write(1, records) is None


def test_a_resumed_run_drops_the_steps_it_will_write_again(tmp_path: Path) -> None:
    records, _ = groups_of(EDGE_CASES["one reply in all"])
    log = GroupLog(tmp_path)
    for step in range(1, 5):
        log.write(step, records)
    log.drop_after(2)
    assert sorted(file.name for file in tmp_path.iterdir()) == with_manifests("step_000001.jsonl", "step_000002.jsonl")
    GroupLog(tmp_path / "not yet there").drop_after(0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, _ = groups_of(EDGE_CASES["one reply in all"])
    log = GroupLog(tmp_path)
    file = log.write(1, records)
    assert file is not None
    before = file.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        log.write(1, records * 3)
    assert file.read_bytes() == before


def test_numbers_that_json_lacks_come_back_as_nan(tmp_path: Path) -> None:
    sample = SampleRecord("x", math.inf, math.nan, 0.5, 0.0, math.nan, 1, False)
    file = GroupLog(tmp_path).write(1, [GroupRecord("p", [Message(role="user", content="?")], [sample])])
    assert file is not None
    (read,) = read_group_log(file).groups
    assert math.isnan(read.samples[0].safe_score)
    assert math.isnan(read.samples[0].logit)
    assert read.kind is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad.jsonl:1: not a group log"),
        ("[]\n", r"bad.jsonl:1: not a group log"),
        ('{"schema": "ups-rm group log 9"}\n', r'bad.jsonl:1: field "schema" is not "ups-rm group log 1"'),
        (
            '{"schema": "ups-rm group log 1", "step": 1, "groups_total": 1}\n{"prompt_id": 1}\n',
            r"bad.jsonl:2: not a group log \('samples'\)",
        ),
        (
            '{"schema": "ups-rm group log 1", "step": 1, "groups_total": 1}\n{"samples": [{"respon": 1}]}\n',
            r"bad.jsonl:2: not a group log .*respon",
        ),
    ],
)
def test_a_file_of_another_form_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_group_log(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("name", [name for name in PER_REPLY if name != "reinforce_plus_plus_baseline"])
@given(data=st.data(), scale_by_std=st.booleans())
@patient
def test_every_estimator_within_the_group_recomputes_exactly(
    tmp_path: Path, name: str, data: st.DataObject, scale_by_std: bool
) -> None:
    batch = data.draw(batches(min_group=2 if name == "grpo_passk" else 1))
    records, _ = groups_of(batch, scale_by_std, name)
    file = GroupLog(tmp_path, adv_estimator=name, scale_by_std=scale_by_std).write(1, records)
    assert file is not None
    read = read_group_log(file)
    assert read.recompute_advantages() == [[sample.advantage for sample in group.samples] for group in read.groups]


def test_what_cannot_be_recomputed_is_not_recomputed_wrongly(tmp_path: Path) -> None:
    records, _ = groups_of(EDGE_CASES["hole in the mask"])
    file = GroupLog(tmp_path, adv_estimator="reinforce_plus_plus_baseline").write(1, records)
    assert file is not None
    with pytest.raises(DataError, match="depend on the whole batch"):
        read_group_log(file).recompute_advantages()
    file = GroupLog(tmp_path, adv_estimator="opo", max_samples_per_group=1).write(1, records)
    assert file is not None
    with pytest.raises(DataError, match=r"(?s)opo needs all \d+ replies of a group, 1 of .*fix: .*_group=-1"):
        read_group_log(file).recompute_advantages()


@pytest.mark.parametrize("record", [SampleRecord, GroupRecord])
def test_the_schema_in_the_docs_has_every_field(record: Any) -> None:
    documented = set(re.findall(r"^\| `(\w+)`", (REPO / "docs" / "metrics.md").read_text(encoding="utf-8"), re.M))
    assert {field.name for field in fields(record)} <= documented


def test_kl_of_each_token_is_kept_where_its_place_in_the_text_is_known(tmp_path: Path) -> None:
    """Three digits of each, for the tokens of the mask alone; the sum stays exact; files without it read as before."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    kl = torch.tensor([[0.123456, -0.5, 9.0], [0.0, 2.0, 1e-5]]) * mask
    common: dict[str, Any] = {
        "group_ids": torch.tensor([0, 0]),
        "prompt_ids": [7, 7],
        "messages": [[Message(role="user", content="Why?")]] * 2,
        "responses": ["no <", "yes"],
        "scores": [Score(0.0, 0.5, 1, False)] * 2,
        "token_level_rewards": mask * 0,
        "advantages": mask * 0,
        "response_mask": mask,
    }
    records = group_records(**common, kl=kl, token_ends=[[2, 4], [1, 3, 3]])
    file = GroupLog(tmp_path).write(1, records)
    assert file is not None
    first, second = read_group_log(file).groups[0].samples
    assert (first.token_kl, first.token_ends) == ([0.123, -0.5], [2, 4])
    assert (second.token_kl, second.token_ends) == ([0.0, 2.0, 1e-5], [1, 3, 3])
    assert first.kl == pytest.approx(0.123456 - 0.5, abs=1e-7)
    for without in ({"kl": kl}, {"kl": kl * 0, "token_ends": [[2, 4], [1, 3, 3]]}, {"token_ends": [[2, 4], [1, 3, 3]]}):
        assert group_records(**common, **without)[0].samples[0].token_kl == []
    lines = file.read_text().splitlines()
    old = json.loads(lines[1])
    for sample in old["samples"]:
        del sample["token_kl"], sample["token_ends"]
    write_text(file, "\n".join([lines[0], json.dumps(old)]) + "\n")
    assert [sample.token_kl for sample in read_group_log(file).groups[0].samples] == [[], []]


def test_helpfulness_stands_beside_the_logit_and_may_be_missing(tmp_path: Path) -> None:
    """A number where a model judged it, None (not nan) where none did and in logs of before there was such a field."""
    mask = torch.ones(2, 3)
    records = group_records(
        group_ids=torch.tensor([0, 0]),
        prompt_ids=[7, 7],
        messages=[[Message(role="user", content="Why?")]] * 2,
        responses=["no", "yes"],
        scores=[Score(0.0, 0.5, 1, False, helpfulness=-1.25), Score(0.0, 0.5, 1, False)],
        token_level_rewards=mask * 0,
        advantages=mask * 0,
        response_mask=mask,
    )
    file = GroupLog(tmp_path).write(1, records)
    assert file is not None
    assert [sample.helpfulness for sample in read_group_log(file).groups[0].samples] == [-1.25, None]
    write_parquet(tmp_path, Query(), tmp_path / "replies.parquet")
    assert pq.read_table(tmp_path / "replies.parquet")["helpfulness"].to_pylist() == [-1.25, None]
    lines = file.read_text().splitlines()
    old = json.loads(lines[1])
    for sample in old["samples"]:
        del sample["helpfulness"]
    write_text(file, "\n".join([lines[0], json.dumps(old)]) + "\n")
    assert [sample.helpfulness for sample in read_group_log(file).groups[0].samples] == [None, None]
