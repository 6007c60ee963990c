"""What holds of every input, with inputs that hypothesis draws and shrinks: seconds, in every run.

The other way to bad input than `mutate`: values of any shape in every field, rather than good inputs with a fault.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.conftest import make_row
from fuzz import parsers
from ups_rm.errors import RecipeError, RMError
from ups_rm.recipe import known_keys, load_recipe
from ups_rm.reward.card import CARD_FILE, RMCard, verify_folder
from ups_rm.reward.native import load_tokenizer, read_config

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(), max_size=20)  # halves of surrogate pairs, too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
FULL = make_row(1)
rows = st.fixed_dictionaries({}, optional={name: st.just(FULL[name]) | values for name in FULL})
pairs = st.fixed_dictionaries(dict.fromkeys(("prompt", "safe_response", "unsafe_response"), texts | values))
KEYS = list(known_keys())


@given(st.lists(rows | pairs | values, min_size=1, max_size=4))
@QUICK
def test_rows_of_any_shape_are_read_alike_by_line_and_by_column(tmp_path: Path, drawn: list[Any]) -> None:
    target = parsers.Rows(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(json.dumps(one).encode() for one in drawn))
    assert target._read(file) in ("taken", "rows left out")


@given(st.binary(max_size=200), st.sampled_from(["rows.jsonl", "rows.jsonl.gz"]))
@QUICK
def test_bytes_of_any_kind_are_read_alike_by_line_and_by_column(tmp_path: Path, data: bytes, name: str) -> None:
    target = parsers.Rows(tmp_path)
    (tmp_path / name).write_bytes(data)
    assert target._read(tmp_path / name) in ("taken", "rows left out", "refused")


@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3), st.binary(max_size=40))
@QUICK
def test_a_recipe_of_any_values_is_taken_or_refused(tmp_path: Path, drawn: dict[str, Any], more: bytes) -> None:
    document: dict[str, Any] = {}
    for key, value in drawn.items():
        *sections, name = key.split(".")
        place: Any = document
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[name] = value
    file = tmp_path / "own.yaml"
    try:
        file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    except (UnicodeEncodeError, yaml.YAMLError):
        file.write_text(json.dumps(document), encoding="utf-8")
    for overrides in ([], [f"{key}={json.dumps(value)}" for key, value in drawn.items()], [more.decode("latin-1")]):
        try:
            load_recipe(file, overrides)
        except RecipeError as error:
            parsers.checked(error)


arrow = st.sampled_from(
    [pa.string(), pa.binary(), pa.int64(), pa.float32(), pa.bool_(), pa.null(), pa.list_(pa.string()), pa.date32()]
)
CELLS = st.none() | st.integers(-5, 5) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": st.text(max_size=9)}),
    max_size=3,
)


@given(
    st.lists(turns, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["data_source", "reward_model", "extra_info", "prompt", "x"]), arrow, max_size=3),
)
@QUICK
def test_what_the_parquet_check_passes_can_be_read(
    tmp_path: Path, drawn: list[Any], wrong: dict[str, pa.DataType]
) -> None:
    good = {"prompt": drawn, "data_source": ["x"] * len(drawn), "reward_model": [{"ground_truth": ""}] * len(drawn)}
    columns = {**good, **{name: pa.nulls(len(drawn), kind) for name, kind in wrong.items()}}
    target = parsers.Parquets(tmp_path)
    try:
        pq.write_table(pa.table(columns), target.file)
    except pa.ArrowException:  # lists of nothing have no type that parquet holds
        return
    assert target._read() in ("taken", "told", "refused")


@pytest.fixture(scope="module")
def card(rm_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((rm_folder / CARD_FILE).read_text(encoding="utf-8"))
    return found


@given(st.data())
@QUICK
def test_a_card_of_any_values_is_taken_or_refused(
    tmp_path: Path, rm_folder: Path, card: dict[str, Any], data: st.DataObject
) -> None:
    changed = dict(card) | data.draw(
        st.dictionaries(st.sampled_from(sorted(card)) | texts, values, min_size=1, max_size=2)
    )
    if data.draw(st.booleans()):
        golden = [dict(one) for one in card["golden"]]
        golden[0][data.draw(st.sampled_from(sorted(golden[0])))] = data.draw(values)
        changed = {**card, "golden": golden}
    (tmp_path / CARD_FILE).write_text(json.dumps(changed), encoding="utf-8")
    try:
        found = RMCard.read(tmp_path)
        assert found is not None
        verify_folder(found, rm_folder, load_tokenizer(rm_folder))
    except RMError as error:
        parsers.checked(error)


@given(values)
@QUICK
def test_a_config_of_any_value_is_taken_or_refused(tmp_path: Path, drawn: Any) -> None:
    from ups_rm.reward.native import myrm_config

    for config in (
        drawn,
        {"hidden_dim_str": drawn},
        {"hidden_dim_str": "8", "model_type": "llama", "vocab_size": drawn},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for read in (read_config, myrm_config):
            try:
                read(tmp_path)
            except RMError as error:
                parsers.checked(error, "config.json")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="the reward server is an extra")
    from fuzz.http_server import Server

    found = Server(Path())
    yield found
    found.close()


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | texts, "content": texts | scalars}),
    max_size=3,
)
bodies = st.one_of(
    st.fixed_dictionaries({"conversations": st.lists(messages, max_size=3)}),
    st.fixed_dictionaries({"query": st.lists(texts, max_size=3), "prompts": st.none() | st.lists(texts, max_size=3)}),
    st.fixed_dictionaries({"input": texts | st.lists(texts, max_size=3)}),
    st.fixed_dictionaries({"messages": messages}),
    values,
)


@given(st.sampled_from(["/score", "/get_reward", "/classify"]), bodies)
@QUICK
def test_a_request_of_any_shape_is_answered(server: Any, path: str, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(data)))]
    asked = server._straight(random.Random(1), "POST", path, headers, data)
    status, answer = server.loop.run_until_complete(asyncio.wait_for(asked, 60))
    server._holds(status, answer, path, "POST")
    assert status in (200, 400, 413, 422)
    assert status == 200 or set(json.loads(answer)) == {"error"}
