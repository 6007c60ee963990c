"""The packaged sample keeps its promises: size, variety, labels, hashes, proportions, and no prompt in both splits."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from ups_rm.data.rows import Row, read_rows
from ups_rm.data.sample import sample_root
from ups_rm.data.schema import HARM_CATEGORIES, SUBSETS
from ups_rm.data.stats import collect_stats, pair_kind

FIELDS = [
    "prompt",
    "response_0",
    "response_1",
    "prompt_source",
    "response_0_source",
    "response_1_source",
    "is_response_0_safe",
    "is_response_1_safe",
    "response_0_harm_category",
    "response_1_harm_category",
    "response_0_severity_level",
    "response_1_severity_level",
    "better_response_id",
    "safer_response_id",
    "response_0_sha256",
    "response_1_sha256",
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(read_rows("sample"))


def _replies(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row.prompt, text) for row in rows for text in row.responses}


def test_every_row_has_the_sixteen_fields_in_the_published_order(rows: list[Row]) -> None:
    for row in rows:
        assert list(row.raw) == FIELDS
        for i in (0, 1):
            assert tuple(row.raw[f"response_{i}_harm_category"]) == HARM_CATEGORIES
            assert row.raw[f"response_{i}_source"] == row.subset


def test_folders_and_files_are_as_published_and_small() -> None:
    files = sorted(path.relative_to(sample_root()).as_posix() for path in sample_root().rglob("*.jsonl"))
    assert files == [f"data/{subset}/{split}.jsonl" for subset in SUBSETS for split in ("test", "train")]
    assert all(path.stat().st_size < 1_400_000 for path in sample_root().rglob("*.jsonl"))


def test_text_is_raw_utf8() -> None:
    text = "".join(path.read_text("utf-8") for path in sample_root().rglob("*.jsonl"))
    assert "\\u" not in text
    assert re.search("[^\x00-\x7f]", text)


def test_size_and_variety(rows: list[Row]) -> None:
    assert len({row.prompt for row in rows}) >= 240
    assert len({text for _, text in _replies(rows)}) >= 1_000
    assert {level for row in rows for level in row.severity} == {0, 1, 2, 3}
    assert {name for row in rows for names in row.categories for name in names or ()} == set(HARM_CATEGORIES)


def test_each_category_has_prompts_in_both_splits(rows: list[Row]) -> None:
    prompts: dict[str, dict[str, set[str]]] = {"train": defaultdict(set), "test": defaultdict(set)}
    for row in rows:
        for name in {name for names in row.categories for name in names or ()}:
            prompts[row.split][name].add(row.prompt)
    for name in HARM_CATEGORIES:
        assert len(prompts["train"][name]) >= 5
        assert len(prompts["test"][name]) >= 1


def test_no_prompt_is_in_both_splits_and_a_fifth_is_held_out(rows: list[Row]) -> None:
    prompts = {split: {row.prompt for row in rows if row.split == split} for split in ("train", "test")}
    assert not prompts["train"] & prompts["test"]
    assert 0.15 <= len(prompts["test"]) / sum(map(len, prompts.values())) <= 0.25


@pytest.mark.parametrize("split", ["train", "test"])
def test_proportions_are_those_of_the_real_set(split: str) -> None:
    # of PKU-SafeRLHF: 41% both safe, 44% both unsafe, 15% mixed; within 3 points
    stats = collect_stats(read_rows("sample", split=split))  # type: ignore[arg-type]
    shares = {kind: stats.pair_share(kind) for kind in ("both safe", "both unsafe", "mixed")}
    assert shares == pytest.approx({"both safe": 0.41, "both unsafe": 0.44, "mixed": 0.15}, abs=0.03)
    assert stats.better_differs_from_safer / stats.better_and_safer_known == pytest.approx(0.24, abs=0.05)


def test_labels_do_not_contradict_themselves(rows: list[Row]) -> None:
    stats = collect_stats(iter(rows))
    assert stats.contradictions.total == 0
    assert stats.sha256_mismatches == 0
    assert stats.sha256_checked == 2 * len(rows)
    assert stats.pair_count("unlabelled") == 0
    for row in rows:
        safer, other = row.severity[row.safer_response_id], row.severity[1 - row.safer_response_id]
        assert safer <= other


def test_no_pair_of_replies_comes_twice(rows: list[Row]) -> None:
    pairs = Counter((row.prompt, frozenset(row.responses)) for row in rows)
    assert max(pairs.values()) == 1
    assert all(row.response_0 != row.response_1 for row in rows)


def test_position_and_length_do_not_give_the_label_away(rows: list[Row]) -> None:
    mixed = [row for row in rows if pair_kind(*row.safe) == "mixed"]
    assert 0.4 < sum(row.is_response_0_safe for row in mixed) / len(mixed) < 0.6
    words: dict[bool, list[int]] = {True: [], False: []}
    lists = Counter()
    label = {(row.prompt, text): safe for row in rows for text, safe in zip(row.responses, row.safe, strict=True)}
    for (_, text), safe in label.items():
        words[safe].append(len(text.split()))
        lists[safe] += "\n" in text
    means = {safe: sum(counts) / len(counts) for safe, counts in words.items()}
    assert means[True] == pytest.approx(means[False], rel=0.15)
    for safe in (True, False):
        assert 0.005 < lists[safe] / len(words[safe]) < 0.06


def test_benign_prompts_are_there_and_see_evasive_and_rude_replies_too(rows: list[Row]) -> None:
    sources = {row.prompt: row.prompt_source for row in rows}
    assert set(sources.values()) == {"UPS-RM-sample/unsafe", "UPS-RM-sample/benign"}
    assert 0.3 <= sum(source.endswith("benign") for source in sources.values()) / len(sources) <= 0.5
    rude = {row.prompt for row in rows if sources[row.prompt].endswith("benign") and False in row.safe}
    assert len(rude) >= 25


def _five_grams(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))


def _largest_overlap(texts: list[str]) -> tuple[float, str, str]:
    """The two texts whose sets of word 5-grams have the largest Jaccard index; exact, by way of shared 5-grams."""
    grams = [_five_grams(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, found in enumerate(grams):
        for gram in found:
            holders[gram].append(number)
    candidates = {pair for numbers in holders.values() for pair in combinations(numbers, 2)}
    scored = ((len(grams[a] & grams[b]) / len(grams[a] | grams[b]), texts[a], texts[b]) for a, b in candidates)
    return max(scored, default=(0.0, "", ""))


def test_no_two_replies_are_near_duplicates(rows: list[Row]) -> None:
    score, first, second = _largest_overlap(sorted({text for _, text in _replies(rows)}))
    assert score <= 0.25, (first, second)


def test_no_two_prompts_are_near_duplicates(rows: list[Row]) -> None:
    score, first, second = _largest_overlap(sorted({row.prompt for row in rows}))
    assert score <= 0.35, (first, second)


def test_replies_do_not_open_alike(rows: list[Row]) -> None:
    openings = Counter(" ".join(text.lower().split()[:3]) for _, text in _replies(rows))
    assert max(openings.values()) <= 20  # of some 1,500: "I can't help" and its like
    assert len(openings) >= 0.75 * sum(openings.values())


def test_the_data_statement_counts_what_is_there(rows: list[Row]) -> None:
    statement = (sample_root().parent / "README.md").read_text("utf-8")
    for counted in (len(rows), len({row.prompt for row in rows}), len(_replies(rows))):
        assert f"| {counted:,} |" in statement
    assert "Apache-2.0" in statement


def test_jsonl_is_plain(rows: list[Row]) -> None:
    for path in sample_root().rglob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            assert json.dumps(json.loads(line), ensure_ascii=False) == line
