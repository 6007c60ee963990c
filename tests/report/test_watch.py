"""`ups-rm watch`: news of a run that goes on, to this machine alone unless there is a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from test_report import unpacked

from tiny_training import command
from ups_rm.errors import RMServerError, RunError
from ups_rm.report import watch
from ups_rm.report.watch import Watched, WatchServer
from ups_rm.reward.server import listen

TOKEN = "sixteen-letters-and-more"


@pytest.fixture
def going_on(first: Path, tmp_path: Path) -> Path:
    """The first run as it was after two of its four steps."""
    folder = shutil.copytree(first, tmp_path / "going on")
    for name in ("summary.json", "report.html", "train_result.json"):
        (folder / name).unlink()
    for name in ("policy", "eval"):
        shutil.rmtree(folder / name)
    for step in (3, 4):
        (folder / f"groups/step_00000{step}.jsonl").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # and half a line
    return folder


def one_step_more(folder: Path, finished: Path) -> None:
    shutil.copy(finished / "groups/step_000003.jsonl", folder / "groups")
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n")


def run_in(answer: httpx.Response) -> dict[str, Any]:
    [run] = unpacked(answer.text)["runs"]
    return run  # type: ignore[no-any-return]


def test_news_come_and_what_is_old_is_not_sent_again(going_on: Path, first: Path) -> None:
    with WatchServer([going_on], listener=listen("127.0.0.1", 0, None), token=None) as server:
        page = httpx.get(server.url)
        assert page.status_code == 200
        assert "connect-src &#39;self&#39;" in page.text
        old = httpx.get(server.url + "data")
        assert run_in(old)["steps"] == 2
        assert not run_in(old)["finished"]
        tag = {"if-none-match": old.headers["etag"]}
        assert httpx.get(server.url + "data", headers=tag).status_code == 304
        one_step_more(going_on, first)
        until = monotonic() + 60
        while (new := httpx.get(server.url + "data", headers=tag)).status_code == 304 and monotonic() < until:
            sleep(0.1)
        assert run_in(new)["steps"] == 3
        assert len(run_in(new)["groups"]["steps"]) == 3
        assert httpx.get(server.url + "groups").status_code == 404
        assert httpx.post(server.url + "data").status_code == 405


def test_pages_are_made_one_at_a_time_and_not_too_often(going_on: Path, first: Path, monkeypatch: Any) -> None:
    watched = Watched([going_on])
    before = watched.latest()
    one_step_more(going_on, first)
    assert watched.latest() is before  # a page has just been made
    monkeypatch.setattr(watch, "monotonic", lambda: monotonic() + 3600)
    with watched._lock:  # somebody else makes one
        assert watched.latest() is before
    assert watched.latest().tag != before.tag


def test_pages_of_other_sites_get_nothing(going_on: Path) -> None:
    """A name of theirs may lead to this machine (DNS rebinding); then the Host header is theirs."""
    with WatchServer([going_on], listener=listen("127.0.0.1", 0, None), token=None) as server:
        for host in ("evil.example", "127.0.0.1.evil.example", ""):
            assert httpx.get(server.url + "data", headers={"host": host}).status_code == 400
        port = server.url.rsplit(":", 1)[1].strip("/")
        assert httpx.get(server.url + "data", headers={"host": f"localhost:{port}"}).status_code == 200
        answer = httpx.get(server.url)
        assert answer.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in answer.headers


def test_a_token_is_asked_for_by_every_page(going_on: Path) -> None:
    with WatchServer([going_on], listener=listen("127.0.0.1", 0, TOKEN), token=TOKEN) as server:
        for path in ("", "data", "elsewhere"):
            refused = httpx.get(server.url + path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
            assert "safe" not in refused.text
        assert httpx.get(server.url, auth=("", "wrong" * 5)).status_code == 401
        assert httpx.get(server.url, auth=("anyone", TOKEN)).status_code == 200
        assert httpx.get(server.url + "data", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_other_machines_are_not_served_without_a_token(going_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPS_RM_TOKEN", raising=False)
    with pytest.raises(RMServerError, match="there is no token"):
        listen("0.0.0.0", 0, None)
    assert command("watch", going_on, "--host", "0.0.0.0", "--port", "0") == 2
    assert command("watch", going_on.parent, "--port", "0") == 2
    with pytest.raises(RunError, match="is not a run folder"):
        Watched([going_on.parent])


def test_a_run_that_goes_away_is_said(going_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SHARE_OF_TIME", 1e9)
    with WatchServer([going_on], listener=listen("127.0.0.1", 0, None), token=None) as server:
        shutil.rmtree(going_on)
        answer = httpx.get(server.url + "data")
        assert answer.status_code == 503
        assert "is not a run folder" in answer.text


def test_a_signal_before_the_server_listens_to_signals_is_not_lost(going_on: Path) -> None:
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    server = WatchServer([going_on], listener=listen("127.0.0.1", 0, None), token=None)
    try:
        server.end_on_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        server.run()  # would serve for ever
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def test_the_command_serves_until_it_is_asked_to_end(going_on: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UPS_RM_TOKEN"}
    child = subprocess.Popen(
        [sys.executable, "-m", "ups_rm", "watch", str(going_on), "--port", "0"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        url = line.split("open ")[1].split(" ")[0]
        assert run_in(httpx.get(url + "data"))["steps"] == 2
        child.send_signal(signal.SIGTERM)
        assert "no longer served" in child.communicate(timeout=60)[0]
        assert child.returncode == 0
    finally:
        child.kill()
    assert json.loads((going_on / "groups/step_000001.jsonl").read_text().splitlines()[0])["step"] == 1
