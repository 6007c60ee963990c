"""wandb for real: offline runs are read back from their folder, online runs by a server on this machine."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ups_rm.tracking import Trackers

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


def records(folder: Path) -> list[Any]:
    """Everything in the folder's one offline run. The file is LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, at, parts, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


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
