"""Stages: what is done is skipped, what changed is done again, what is the user's is never touched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ups_rm.content import content_hash
from ups_rm.errors import RunError
from ups_rm.stages import Stage, read_stamp, run_stage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPS_RM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Work:
    """A stage that copies its input in capitals and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "in.txt", folder / "out"
        self.source.write_text("hello")
        self.count = 0
        self.action: Callable[[], object] = self.copy
        self.settings: dict[str, Any] = {"times": 1}
        self.options: dict[str, Any] = {}

    def copy(self) -> None:
        self.count += 1
        (self.out / "made.txt").write_text(self.source.read_text().upper() * int(self.settings["times"]))

    def run(self, *, fresh: bool = False) -> float:
        return run_stage(self.stage(), fresh=fresh)

    def stage(self) -> Stage:
        return Stage(
            name="work", inputs=[self.source, "some/hub-id"], settings=self.settings, out=self.out,
            outputs=[self.out / "made.txt"], action=lambda: self.action(), **self.options,
        )  # fmt: skip

    @property
    def made(self) -> str:
        return (self.out / "made.txt").read_text()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_finished_stage_is_skipped_and_keeps_its_seconds(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    work.action = lambda: (time.sleep(0.05), work.copy())
    first = work.run()
    assert first >= 0.05
    assert work.run() == pytest.approx(first)
    assert (work.count, work.made) == (1, "HELLO")
    assert "skipped" in capsys.readouterr().out


def test_touching_a_file_is_no_change_but_its_content_is(work: Work) -> None:
    work.run()
    os.utime(work.source, (1, 1))
    work.run()
    assert work.count == 1
    work.source.write_text("hallo")
    work.run()
    assert (work.count, work.made) == (2, "HALLO")


@pytest.mark.parametrize("size", [10, 3_000_000], ids=["small", "remembered"])
def test_large_files_are_noticed_too(work: Work, size: int) -> None:
    """Those over 1 MB are hashed once per size and time of change."""
    work.source.write_text("a" * size)
    work.run()
    work.run()
    assert work.count == 1
    work.source.write_text("a" * (size - 1) + "b")
    os.utime(work.source, ns=(1, 2))
    work.run()
    assert work.count == 2


def test_other_settings_do_it_again_and_leave_nothing_old(work: Work) -> None:
    work.run()
    work.settings = {"times": 2}
    work.run()
    assert (work.count, work.made) == (2, "HELLOHELLO")
    work.settings = {"times": 1}
    work.run()
    assert (work.count, work.made) == (3, "HELLO")


def test_folders_are_hashed_by_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    first = content_hash(folder)
    assert content_hash(folder) == first
    (folder / "sub" / "b").rename(folder / "sub" / "c")
    renamed = content_hash(folder)
    (folder / "sub" / "c").rename(folder / "c")
    moved = content_hash(folder)
    (folder / "c").write_text("3")
    assert len({first, renamed, moved, content_hash(folder)}) == 4
    assert content_hash("owner/model") != content_hash("owner/other")


def test_a_result_that_is_gone_or_changed_is_made_again(work: Work) -> None:
    work.run()
    (work.out / "made.txt").unlink()
    work.run()
    assert (work.count, work.made) == (2, "HELLO")
    (work.out / "made.txt").write_text("someone was here")
    work.run()
    assert (work.count, work.made) == (3, "HELLO")


def test_fresh_does_it_again(work: Work) -> None:
    work.run()
    work.run(fresh=True)
    assert work.count == 2


def test_a_folder_of_someone_else_is_refused_even_when_fresh(work: Work) -> None:
    work.out.mkdir()
    (work.out / "thesis.txt").write_text("ten years of work")
    for fresh in (False, True):
        with pytest.raises(RunError, match="was not made by this command: nothing is overwritten"):
            work.run(fresh=fresh)
    assert (work.out / "thesis.txt").read_text() == "ten years of work"
    assert work.count == 0


@pytest.mark.parametrize("again", ["fresh", "settings", "input"])
def test_files_that_the_user_put_beside_the_results_stay(work: Work, again: str) -> None:
    work.run()
    (work.out / "notes.txt").write_text("mine")
    if again == "settings":
        work.settings = {"times": 2}
    if again == "input":
        work.source.write_text("hallo")
    work.run(fresh=again == "fresh")
    assert work.count == 2
    assert (work.out / "notes.txt").read_text() == "mine"


def test_files_of_the_user_stay_however_often_a_stage_begins_anew(work: Work) -> None:
    """Also where one of these times was interrupted."""
    work.run()
    (work.out / "notes.txt").write_text("mine")
    work.run(fresh=True)
    work.action = partial(work)
    with pytest.raises(Stop):
        work.run(fresh=True)
    work.action = work.copy
    work.run(fresh=True)
    work.run(fresh=True)
    assert work.count == 4
    assert sorted(path.name for path in work.out.iterdir()) == ["made.txt", "notes.txt"]
    assert (work.out / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_used(work: Work) -> None:
    work.out.mkdir()
    work.run()
    assert work.made == "HELLO"


class Stop(Exception):
    pass


def partial(work: Work) -> Callable[[], None]:
    """An action that writes half, then stops the first time and goes on the second."""

    def action() -> None:
        half = work.out / "half.txt"
        if not half.exists():
            half.write_text("half")
            time.sleep(0.05)
            raise Stop
        work.copy()

    return action


def test_partial_work_is_gone_on_with_where_a_stage_can(work: Work) -> None:
    work.options, work.action = {"keeps_partial": True}, partial(work)
    with pytest.raises(Stop):
        work.run()
    assert "made" not in read_stamp(work.stage())
    seconds = work.run()
    assert (work.count, (work.out / "half.txt").read_text()) == (1, "half")
    assert seconds >= 0.05, "the time before the interruption counts"
    work.run()
    assert work.count == 1


def test_partial_work_is_dropped_where_a_stage_cannot(work: Work) -> None:
    work.action = partial(work)
    for _ in range(2):
        with pytest.raises(Stop):
            work.run()
    assert work.count == 0


def test_partial_work_of_other_settings_is_dropped(work: Work) -> None:
    work.options, work.action = {"keeps_partial": True}, partial(work)
    with pytest.raises(Stop):
        work.run()
    work.settings = {"times": 2}
    with pytest.raises(Stop):  # half.txt was removed, so the action begins anew
        work.run()


def test_a_precious_folder_of_other_settings_is_refused_unless_fresh(work: Work) -> None:
    work.options = {"precious": True, "keeps_partial": True}
    work.run()
    work.settings = {"times": 2}
    with pytest.raises(RunError, match="with other settings or inputs: nothing is overwritten"):
        work.run()
    assert (work.count, work.made) == (1, "HELLO")
    work.run(fresh=True)
    assert (work.count, work.made) == (2, "HELLOHELLO")


def test_a_stage_that_makes_nothing_is_an_error_and_not_done(work: Work) -> None:
    work.action = lambda: None
    for _ in range(2):
        with pytest.raises(RunError, match=r"stage work ended without making .*made\.txt"):
            work.run()
    work.action = work.copy
    work.run()
    assert work.made == "HELLO"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"hash": 1}'])
def test_a_damaged_stamp_is_no_stamp(work: Work, damage: str) -> None:
    """Nothing is deleted on the word of a file that can't be read."""
    work.run()
    work.stage().stamp.write_text(damage)
    if damage == '{"hash": 1}':
        work.run()
        assert work.count == 2
        return
    with pytest.raises(RunError, match="nothing is overwritten"):
        work.run()
    assert work.made == "HELLO"


def test_links_are_removed_and_not_followed(work: Work, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("keep")

    def linking() -> None:
        (work.out / "link").symlink_to(elsewhere)
        work.copy()

    work.action = linking
    work.run()
    work.run(fresh=True)
    assert (elsewhere / "file").read_text() == "keep"


def test_a_cache_that_cannot_be_written_costs_only_time(work: Work, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    work.source.write_text("a" * 2_000_000)
    work.run()
    work.run()
    assert work.count == 1
