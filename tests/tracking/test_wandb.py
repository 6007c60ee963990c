"""wandb for real: offline runs are read back from their folder, online runs by a server on this machine."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ups_rm.tracking import Trackers
from ups_rm.tracking.trackers import BEFORE_ANY
from ups_rm.tracking.wandb_run import last_step
from wandb_files import history, records

wandb = pytest.importorskip("wandb", reason='needs wandb: pip install "ups-rm[wandb]"')
CONFIG = {"trainer": {"total_epochs": 2}}


@pytest.fixture(autouse=True)
def quiet_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials and no settings of the machine's user; nothing printed."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def run(folder: Path, steps: list[int], **more: Any) -> None:
    with Trackers(
        ["wandb"], project_name="proj", experiment_name="exp", folder=folder, config=CONFIG, **more
    ) as trackers:
        for step in steps:
            trackers.log({"critic/score/mean": step / 8, "actor/lr": 1e-5}, step)
    wandb.teardown()  # ends wandb's own process, as the end of ours would: only then is its file surely complete


def test_offline_writes_a_run_folder_that_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, [1, 2, 3])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    lines = history(folder)
    assert [(line["_step"], line["critic/score/mean"]) for line in lines] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    (start,) = [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]
    assert (start.project, start.display_name) == ("proj", "exp")
    config = "".join(str(record.config) for record in records(folder) if record.WhichOneof("record_type") == "config")
    assert "trainer.total_epochs" in config


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, [1, 2])
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    run(tmp_path, [3], resume_step=2)
    assert (tmp_path / "wandb" / "run_id.txt").read_text().strip() == run_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}*"))) == 2
    run(tmp_path, [1])
    assert (tmp_path / "wandb" / "run_id.txt").read_text().strip() != run_id


def steps_on_the_disk(folder: Path) -> list[int]:
    """All offline folders of the run together, in the order of their making: what `wandb sync` sends."""
    found = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns)
    return [line["_step"] for one in found for line in history(one)]


def test_steps_that_an_earlier_life_has_written_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 5 with a checkpoint of step 2; then killed before its first checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, [1, 2, 3, 4, 5])
    run(tmp_path, [3, 4, 5, 6, 7], resume_step=2)
    assert steps_on_the_disk(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    run(tmp_path, [1, 2, 8], resume_step=BEFORE_ANY)
    assert steps_on_the_disk(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_steps_that_wandb_lost_come_from_the_metrics_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill makes wandb's process drop what it has not written: here all of it, then the end of it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, [1, 2, 3])
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:7])
    run(tmp_path, [3, 4, 5], resume_step=2)
    assert steps_on_the_disk(tmp_path) == [1, 2, 3, 4, 5]
    newest = max((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns)
    assert [(line["_step"], line["critic/score/mean"]) for line in history(newest)][:2] == [(1, 0.125), (2, 0.25)]


def test_the_id_of_a_checkpoint_serves_where_the_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Trackers(["wandb"], project_name="p", experiment_name="e", folder=tmp_path / "a", config=CONFIG)
    run_ids = dict(first.run_ids)
    first.finish()
    assert list(run_ids) == ["wandb"]
    for resume_step, same in ((2, True), (None, False)):
        folder = tmp_path / f"b{resume_step}"
        again = Trackers(
            ["wandb"], project_name="p", experiment_name="e", folder=folder, config=CONFIG, run_ids=run_ids,
            resume_step=resume_step,
        )  # fmt: skip
        assert (again.run_ids == run_ids) == same
        again.finish()


@pytest.mark.parametrize("end", [0, 3, 7, 20, 40_000, -1, -9])
def test_a_torn_offline_file_is_read_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, list(range(1, 400)))  # more than one block of the file's format
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data, run_id = file.read_bytes(), (tmp_path / "wandb/run_id.txt").read_text().strip()
    assert len(data) > 50_000
    assert last_step(tmp_path / "wandb", run_id) == 399
    file.write_bytes(data[:end])
    found = last_step(tmp_path / "wandb", run_id)
    assert found == -1 if 0 <= end < 40 else 0 < found <= 399
    assert last_step(tmp_path / "wandb", "another") == -1


def test_without_a_key_it_goes_offline_instead_of_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [1, 2])
    message = capsys.readouterr().err
    assert "wandb can't go online" in message
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in message
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [line["_step"] for line in history(folder)] == [1, 2]


class FakeServer(BaseHTTPRequestHandler):
    """Just enough of wandb's server: who is there, yes to every run, and a note of what was streamed to it."""

    protocol_version = "HTTP/1.1"
    buckets: list[dict[str, Any]]
    streamed: list[dict[str, Any]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            if request.get("operationName") == "UpsertBucket":
                self.buckets.append(request["variables"])
                self._answer({"upsertBucket": {"bucket": self._bucket(request["variables"]), "inserted": True}})
            else:
                viewer = {
                    "id": "1",
                    "entity": "me",
                    "username": "me",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
                self._answer({"viewer": viewer, "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}})
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.streamed.extend(json.loads(line) for line in lines)
            self._answer({})
        else:
            self._answer({})

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "2", "name": variables.get("project") or "proj", "entity": {"id": "3", "name": "me"}}
        return {"id": "4", "name": variables["name"], "displayName": variables.get("displayName"), "project": project}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, data: dict[str, Any]) -> None:
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeServer]]:
    monkeypatch.setattr(FakeServer, "buckets", [], raising=False)
    monkeypatch.setattr(FakeServer, "streamed", [], raising=False)
    http = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield FakeServer
    http.shutdown()
    http.server_close()


def test_online_streams_every_step_to_the_server(tmp_path: Path, server: type[FakeServer]) -> None:
    run(tmp_path, [1, 2, 3])
    assert server.buckets[0]["displayName"] == "exp"
    assert server.buckets[0]["project"] == "proj"
    assert any("trainer.total_epochs" in (bucket.get("config") or "") for bucket in server.buckets)
    seen = {line["_step"]: line["critic/score/mean"] for line in server.streamed if "critic/score/mean" in line}
    assert seen == {1: 0.125, 2: 0.25, 3: 0.375}
