"""Features: the right states with the right labels, each text once, and no work lost when the process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labelled_rows import make_rows
from tiny import tiny_backbone
from ups_rm.data.rows import Row, text_hash
from ups_rm.data.schema import HARM_CATEGORIES
from ups_rm.errors import RMError
from ups_rm.reward import features as module
from ups_rm.reward.feature_set import FeatureSet, join, ordered_pairs
from ups_rm.reward.features import FeatureReport, backbone_config, backbone_identity, collect_texts, extract_features
from ups_rm.reward.merge import load_backbone_tokenizer
from ups_rm.reward.render import render
from ups_rm.reward.shared_prompt import Row as SharedRow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("features") / "backbone")


def extract(backbone: Path, rows: list[Row], out: Path, **options: object) -> FeatureReport:
    return extract_features(backbone, rows, out, **{"dtype": "float32", "device": "cpu", "progress": False, **options})  # type: ignore[arg-type]


def test_states_are_those_of_each_conversation_alone(backbone: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    rows = make_rows()
    extract(backbone, rows, tmp_path / "f.safetensors", max_batch_tokens=200)
    found = FeatureSet.read(tmp_path / "f.safetensors")
    model, tokenizer = AutoModel.from_pretrained(backbone, dtype=torch.float32), load_backbone_tokenizer(backbone, None)
    texts = collect_texts(rows)
    rendered = render(tokenizer, [texts.conversation(i) for i in range(found.texts)], found.info.render)
    with torch.inference_mode():
        for i, row in enumerate(rendered):
            expected = model(torch.tensor([row.input_ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(found.hidden[i], expected, atol=2e-5, rtol=1e-4)
            assert found.tokens[i] == len(row.input_ids)
    assert (found.hidden[1:] - found.hidden[0]).abs().amax(1).min() > 1e-3  # no two conversations alike


def test_bf16_states_are_those_the_scorer_reads(backbone: Path, tmp_path: Path) -> None:
    """Features, merge, scorer: the head sees in the RM what it was trained on."""
    from tiny import tiny_head
    from ups_rm.reward.head import head_logits
    from ups_rm.reward.head_files import read_head
    from ups_rm.reward.merge import merge
    from ups_rm.reward.scorer import RewardScorer

    rows = make_rows(6)
    extract(backbone, rows, tmp_path / "f.safetensors", dtype="bfloat16")
    head = tiny_head(tmp_path / "head")
    merge(backbone, head, tmp_path / "rm")
    scorer = RewardScorer.load(tmp_path / "rm", dtype="bfloat16")
    texts, found = collect_texts(rows), FeatureSet.read(tmp_path / "f.safetensors")
    scored = torch.tensor([s.logit for s in scorer.score([texts.conversation(i) for i in range(found.texts)])])
    assert found.hidden.dtype == torch.float32
    logits = head_logits(read_head(head).tensors, found.hidden)
    torch.testing.assert_close(logits, scored, atol=0.05, rtol=0.05)  # batches differ, so bf16 rounds differently
    assert torch.corrcoef(torch.stack([logits, scored]))[0, 1] > 0.99


def test_each_text_once_with_the_mean_of_its_labels(backbone: Path, tmp_path: Path) -> None:
    first = make_rows(1, 1)[0]
    rows = [
        replace(first, prompt="P", response_0="A", response_1="B", is_response_0_safe=True, is_response_1_safe=None),
        replace(first, prompt="P", response_0="A", response_1="C", is_response_0_safe=False, is_response_1_safe=True),
        replace(first, prompt="Q", response_0="A", response_1="A", is_response_0_safe=True, is_response_1_safe=True),
    ]
    rows[0] = replace(rows[0], severity=(None, None), categories=((HARM_CATEGORIES[3], HARM_CATEGORIES[18]), None))
    rows[1] = replace(rows[1], severity=(3, 0), categories=((HARM_CATEGORIES[0],), None), safer_response_id=1)
    report = extract(backbone, rows, tmp_path / "f.safetensors")
    found = FeatureSet.read(report.path)
    assert (report.texts, report.rows, found.texts, found.rows) == (4, 3, 4, 3)
    assert found.row_texts.tolist() == [[0, 1], [0, 2], [3, 3]]
    assert found.unsafe[[0, 2, 3]].tolist() == [0.5, 0.0, 0.0]
    assert found.unsafe[1].isnan()
    assert found.severity[0] == 3
    assert found.severity[1].isnan()
    assert found.category_bits[0] == (1 << 3) | (1 << 18) | 1
    assert found.row_unsafe.tolist() == [[0, -1], [1, 0], [0, 0]]
    assert found.row_id.tolist() == [0, 1, 2]
    assert found.prompt_id.tolist() == [text_hash("P") >> 1] * 3 + [text_hash("Q") >> 1]
    assert found.benign.tolist() == [1, 1, 1, 1]
    assert found.info.files == ("rows.jsonl",)
    assert found.info.categories == HARM_CATEGORIES


def test_no_text_is_in_the_file(backbone: Path, tmp_path: Path) -> None:
    extract(backbone, make_rows(2), tmp_path / "f.safetensors")
    assert b"take the bread" not in (tmp_path / "f.safetensors").read_bytes()


def test_pairs_follow_the_flags_and_contradictions_are_left_out(backbone: Path, tmp_path: Path) -> None:
    first = make_rows(1, 1)[0]

    def row(i: int, safe: tuple[bool | None, bool | None], safer: int | None) -> Row:
        return replace(
            first,
            prompt=f"P{i}",
            response_0="A",
            response_1="B",
            is_response_0_safe=safe[0],
            is_response_1_safe=safe[1],
            safer_response_id=safer,
        )

    rows = [
        row(0, (True, False), 0),
        row(1, (False, True), None),
        row(2, (False, False), 1),  # both unsafe: the id says which is less so
        row(3, (True, False), 1),  # contradicts itself
        row(4, (None, True), None),
        row(5, (True, True), None),
    ]
    extract(backbone, rows, tmp_path / "f.safetensors")
    found = FeatureSet.read(tmp_path / "f.safetensors")
    pairs, contradictions = ordered_pairs(found)
    assert contradictions == 1
    assert pairs.tolist() == [[0, 1], [3, 2], [5, 4]]
    assert ordered_pairs(found, by_flags=True)[0].tolist() == [[0, 1], [3, 2], [6, 7]]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from labelled_rows import make_rows
from ups_rm.reward import features
saves = 0
save = features.Parts.save
def save_and_die(self):
    global saves
    save(self)
    saves += 1
    if saves == 5:
        (self.folder / ".000099.safetensors.tmp").write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
features.Parts.save = save_and_die
features.extract_features({backbone!r}, make_rows(), {out!r}, dtype="float32", device="cpu", max_batch_tokens=120,
                          save_seconds=0.0, progress=False)
"""


def test_goes_on_after_a_kill(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "f.safetensors", tmp_path / "whole.safetensors"
    code = KILLED.format(path=sys.path, backbone=str(backbone), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()

    computed: list[int] = []
    real = module.hidden_states

    def counting(model: object, rows: Sequence[SharedRow], *rest: object) -> torch.Tensor:
        computed.extend(len(row.texts) for row in rows)
        return real(model, rows, *rest)

    monkeypatch.setattr(module, "hidden_states", counting)
    report = extract(backbone, make_rows(), out, max_batch_tokens=120)
    assert 5 <= report.resumed < report.texts
    assert sum(computed) == report.texts - report.resumed
    assert {file.name for file in tmp_path.iterdir()} == {"f.safetensors", ".f.safetensors.manifest.json"}
    monkeypatch.undo()
    extract(backbone, make_rows(), whole, max_batch_tokens=120)
    resumed, straight = load_file(out), load_file(whole)
    assert resumed.keys() == straight.keys()
    for name in resumed:
        torch.testing.assert_close(resumed[name], straight[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_parts_of_other_settings_are_not_taken(backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    code = KILLED.format(path=sys.path, backbone=str(backbone), out=str(out))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    report = extract(backbone, make_rows(), out, max_length=40)
    assert report.resumed == 0
    assert report.truncated > 0


def test_a_finished_file_is_kept_and_other_features_need_overwrite(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.safetensors"
    extract(backbone, make_rows(), out)
    before = out.read_bytes()
    with pytest.raises(RMError, match="holds features of other rows"):
        extract(backbone, make_rows(3), out)
    monkeypatch.setattr(module, "load_decoder", lambda *a: pytest.fail("nothing is to be computed again"))
    assert extract(backbone, make_rows(), out).tokens_per_second == 0
    assert out.read_bytes() == before


def test_states_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tiny_backbone(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RMError, match=r"not finite in torch\.float32"):
        extract(broken, make_rows(2), tmp_path / "f.safetensors")


def test_no_rows_and_no_backbone(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(RMError, match="no rows"):
        extract(backbone, [], tmp_path / "f.safetensors")
    with pytest.raises(RMError, match="can't be loaded"):
        extract(tmp_path / "nothing", make_rows(1), tmp_path / "f.safetensors")
    with pytest.raises(RMError, match="no features at"):
        FeatureSet.read(tmp_path / "f.safetensors")


def test_identity_tells_weights_apart(backbone: Path, tmp_path: Path) -> None:
    other = tiny_backbone(tmp_path / "backbone", seed=5)
    same = tiny_backbone(tmp_path / "same" / "backbone")
    names = [backbone_identity(folder, backbone_config(folder)) for folder in (backbone, other, same)]
    assert names[0] != names[1]
    assert names[0] == names[2]


def test_sets_of_one_backbone_join(backbone: Path, tmp_path: Path) -> None:
    rows = make_rows(6)
    extract(backbone, rows, tmp_path / "all.safetensors")
    extract(backbone, rows[:6], tmp_path / "a.safetensors")
    extract(backbone, rows[6:], tmp_path / "b.safetensors")
    whole, a, b = (FeatureSet.read(tmp_path / f"{name}.safetensors") for name in ("all", "a", "b"))
    joined = join([a, b])
    torch.testing.assert_close(joined.hidden[joined.row_texts], whole.hidden[whole.row_texts], atol=1e-5, rtol=1e-5)
    assert joined.row_prompt.tolist() == whole.row_prompt.tolist()
    assert joined.row_id.tolist() == list(range(len(rows)))
    with pytest.raises(RMError, match="differ in dtype"):
        join([a, replace(b, info=replace(b.info, dtype="bfloat16"))])
