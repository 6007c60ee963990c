"""What is fuzzed: each parser with good inputs to start from, one bad input per case, and what must hold of it.

`case(draw)` returns what became of the input ("taken", "refused", ...). Any exception is a defect: of the parser if it
is an error that is none of ours, of what must hold if it is an AssertionError.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from data.conftest import make_row, old_row
from fuzz import mutate
from ups_rm.errors import DataError, RecipeError, RMError, UpsRmError


class Parser(Protocol):
    """One kind of input; the folder is its own."""

    def __init__(self, folder: Path) -> None: ...

    def case(self, draw: random.Random) -> str: ...

    def shown(self) -> str:
        """The last input, for people."""
        ...

    def close(self) -> None: ...


class Base:
    """Keeps the last input."""

    last: Any = b""

    def shown(self) -> str:
        return repr(self.last)[:2000]

    def close(self) -> None: ...


def checked(error: UpsRmError, *words: str) -> str:
    """A message must be readable: not empty, not endless, and name what it is about."""
    text = str(error)
    assert text.strip(), "an empty message"
    assert len(text) < 20_000, f"a message of {len(text)} characters: {text[:300]}"
    assert all(word in text for word in words), f"{words} not named in: {text[:300]}"
    return "refused"


def as_json(draw: random.Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


class Rows(Base):
    """The row reader: line by line and column by column, which must agree; JSONL, gzip, damaged gzip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plain = {"prompt": "Q?", "safe_response": "No.", "unsafe_response": "Yes."}
        self.good = [make_row(0), make_row(1), old_row(2), plain]
        self.lines = [json.dumps(row).encode() for row in self.good]

    def case(self, draw: random.Random) -> str:
        lines = []
        for _ in range(draw.choice((1, 1, 2, 5))):
            kind = draw.randrange(4)
            row = draw.choice(self.good)
            if kind == 0:
                lines.append(json.dumps(row).encode())
            elif kind == 1:
                lines.append(mutate.damaged(draw, draw.choice(self.lines), self.lines))
            else:
                lines.append(as_json(draw, mutate.mutated(draw, row)))
        data = draw.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + draw.choice((b"", b"\n"))
        name = draw.choice(("rows.jsonl", "rows.jsonl", "rows.jsonl.gz"))
        if name.endswith(".gz"):
            data = gzip.compress(data, 1)
            data = mutate.damaged(draw, data) if draw.random() < 0.5 else data
        self.last, path = (name, data), self.folder / name
        path.write_bytes(data)
        return self._read(path)

    def _read(self, path: Path) -> str:
        from ups_rm.data.columns import block_columns, row_columns
        from ups_rm.data.rows import Reject, read_rows
        from ups_rm.data.sources import iter_blocks, list_parts

        rejects: list[Reject] = []
        try:
            rows = list(read_rows(path, on_reject=rejects.append))
        except DataError as error:
            return checked(error, path.name)
        for reject in rejects:
            assert reject.line > 0
            assert reject.reason
            assert len(str(reject)) < 2000, str(reject)[:300]
        (part,) = list_parts(path)
        found, lines = [], 0
        for block in iter_blocks(part):
            columns, bad, count = block_columns(block, part)
            found.append(columns)
            assert len(bad) + len(columns) <= max(count, 1) + len(block.records)
            lines += count
        strict = row_columns(rows, part.split)
        for name in ("prompt", "safer", "better", "prompt_source", "subset"):
            assert [one for columns in found for one in getattr(columns, name)] == list(getattr(strict, name)), name
        for name in ("response", "safe", "severity", "categories", "sha256"):
            for i in (0, 1):
                of_columns = [one for columns in found for one in getattr(columns, name)[i]]
                assert of_columns == list(getattr(strict, name)[i]), name
        for row in rows:
            json.dumps([row.prompt, *row.responses, row.subset, row.categories], ensure_ascii=False).encode("utf-8")
        return "taken" if not rejects else "rows left out"


class Recipes(Base):
    """The recipe loader: a file, then overrides; the packaged recipes in pieces are what it starts from."""

    def __init__(self, folder: Path) -> None:
        import yaml

        from ups_rm.recipe import Recipe, known_keys

        self.yaml, self.file = yaml, folder / "own.yaml"
        self.dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        self.sections = [(name, values) for name, values in Recipe().as_dict().items()]
        self.keys = list(known_keys())
        self.file.write_text("{}", encoding="utf-8")

    def _document(self, draw: random.Random) -> dict[str, Any]:
        """Two or three branches of a recipe, with some of their keys."""
        made: dict[str, Any] = {}
        for name, values in draw.sample(self.sections, draw.choice((1, 2, 3))):
            place, source = made.setdefault(name, {}), values
            while True:
                key = draw.choice(list(source))
                if not isinstance(source[key], dict):
                    break
                place, source = place.setdefault(key, {}), source[key]
            for key in draw.sample(list(source), min(len(source), draw.choice((1, 3)))):
                if not isinstance(source[key], dict):
                    place[key] = source[key]
        return made

    def case(self, draw: random.Random) -> str:
        from ups_rm.recipe import Recipe, load_recipe

        overrides: list[str] = []
        text = b"{}"
        if draw.random() < 0.75:
            document = self._document(draw)
            document = mutate.mutated(draw, document) if draw.random() < 0.8 else document
            try:
                text = self.yaml.dump(document, Dumper=self.dumper, allow_unicode=True).encode("utf-8", "surrogatepass")
            except (ValueError, UnicodeEncodeError, self.yaml.YAMLError):  # YAML can't say it
                text = json.dumps(document).encode()
            if draw.random() < 0.6:
                text = mutate.damaged(draw, text)
        if text == b"{}" or draw.random() < 0.2:
            for _ in range(draw.choice((1, 2))):
                key, shown = draw.choice(self.keys), mutate.value(draw)
                shown = shown if isinstance(shown, str) else json.dumps(shown)
                one = f"{key}={shown}"
                if draw.random() < 0.3:
                    one = mutate.damaged(draw, one.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
                overrides.append(one)
        self.last = (text, overrides)
        self.file.write_bytes(text)
        try:
            recipe = load_recipe(self.file, overrides, engine=draw.choice(("local", "local", None)))
        except RecipeError as error:
            return checked(error)
        assert isinstance(recipe, Recipe)
        if draw.random() < 0.1:
            again = self.yaml.safe_load(recipe.to_yaml())
            assert _same(again, recipe.as_dict()), "what is written is not what was read"
        return "taken"


def _same(a: Any, b: Any) -> bool:
    """Equal, where nan is nan and a tuple a list."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b) and type(a) is type(b)


class Parquets(Base):
    """The parquet check: what it passes can be read as prompts; also the row reader on the same files."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.pa, self.pq, self.file = pa, pq, folder / "own.parquet"
        self.rows = [
            {
                "data_source": "PKU-SafeRLHF",
                "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {n}?"}],
                "ability": "safety",
                "reward_model": {"style": "model", "ground_truth": None},
                "extra_info": {"split": "train", "index": n, "prompt_source": "x/unsafe"},
            }
            for n in range(3)
        ]
        self.good = []
        for compression in ("snappy", "none", "gzip", "zstd"):
            for rows in (self.rows, [make_row(n) for n in range(3)]):
                pq.write_table(pa.Table.from_pylist(rows), self.file, compression=compression)
                self.good.append(self.file.read_bytes())

    def case(self, draw: random.Random) -> str:
        if draw.random() < 0.5:
            data = mutate.damaged(draw, draw.choice(self.good), self.good)
            self.file.write_bytes(data)
        else:
            rows = draw.choice((self.rows, [make_row(n) for n in range(2)]))
            rows = [mutate.mutated(draw, row, 1) if draw.random() < 0.7 else row for row in rows]
            if draw.random() < 0.4:  # the same wrong type in all rows: arrow takes no mixture
                key, wrong = draw.choice(list(self.rows[0])), mutate.value(draw)
                rows = [{**row, key: wrong} for row in rows if isinstance(row, dict)]
            try:
                self.pq.write_table(self._table(draw, rows), self.file)
            except (self.pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError, KeyError):
                return "arrow can't hold it"
            data = self.file.read_bytes()
        self.last = data
        return self._read()

    def _table(self, draw: random.Random, rows: list[Any]) -> Any:
        table = self.pa.Table.from_pylist(rows)
        if draw.random() < 0.3 and table.num_columns:
            i = draw.randrange(table.num_columns)
            wanted = draw.choice(("large_string", "binary", "string_view", "dictionary", "int8", "double", "timestamp"))
            column, name = table.column(i), table.column_names[i]
            kind = {
                "large_string": self.pa.large_string(),
                "binary": self.pa.binary(),
                "string_view": self.pa.string_view(),
                "int8": self.pa.int8(),
                "double": self.pa.float64(),
                "timestamp": self.pa.timestamp("ns"),
            }.get(wanted)
            if kind is None:
                return table.set_column(i, name, column.combine_chunks().dictionary_encode())
            try:
                return table.set_column(i, name, column.cast(kind))
            except self.pa.ArrowException:
                return table.set_column(i, name, self.pa.nulls(table.num_rows, kind))
        return table

    def _read(self) -> str:
        from ups_rm.data.check import check_parquet
        from ups_rm.data.prompts import read_prompts
        from ups_rm.data.rows import Reject, read_rows

        rejects: list[Reject] = []
        try:
            list(read_rows(self.file, on_reject=rejects.append))
        except DataError as error:
            checked(error, self.file.name)
        assert all(len(str(reject)) < 2000 for reject in rejects)
        try:
            result = check_parquet([self.file])
        except DataError as error:
            return checked(error, self.file.name)
        for problem in result.problems:
            assert len(str(problem)) < 5000, str(problem)[:300]
        try:
            prompts = read_prompts(self.file)
        except DataError as error:
            if result.ok:
                raise AssertionError("the check passed what can't be read") from error
            checked(error, self.file.name)
            return "told"
        assert len(prompts) == result.files[0].rows
        for row in prompts:
            json.dumps(row.messages, ensure_ascii=False).encode("utf-8")
        return "taken" if result.ok else "told"


class Folders(Base):
    """The RM folder loader: config, tokenizer and weights of a folder, one of its files spoilt."""

    def __init__(self, folder: Path) -> None:
        import torch

        from tiny import tiny_rm

        self.torch, self.folder = torch, tiny_rm(folder / "rm", hidden_dims=(4,))
        torch.set_num_threads(1)
        self.good = {file.name: file.read_bytes() for file in self.folder.iterdir() if file.is_file()}
        names = ["config.json"] * 70 + ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"] * 4
        names += ["model.safetensors"] * 9 + ["model.safetensors.index.json"] * 4
        self.names = [name for name in names if name in self.good]

    def case(self, draw: random.Random) -> str:
        name = draw.choice(self.names)
        good = self.good[name]
        if name.endswith(".json") and draw.random() < 0.8:
            data = as_json(draw, mutate.mutated(draw, json.loads(good)))
        elif name.endswith(".safetensors"):
            at = 8 + int.from_bytes(good[:8], "little")  # mostly its header, which says where the tensors are
            data = mutate.damaged(draw, good[:at]) + good[at:] if draw.random() < 0.8 else mutate.damaged(draw, good)
        else:
            data = mutate.damaged(draw, good)
        self.last = (name, data[:2000])
        (self.folder / name).write_bytes(data)
        try:
            return self._load(name, weights_too=draw.random() < 0.04)
        finally:
            (self.folder / name).write_bytes(good)

    def _load(self, name: str, weights_too: bool) -> str:
        from ups_rm.reward.native import load_model, load_tokenizer, myrm_config
        from ups_rm.reward.render import RenderPolicy, render

        talk: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        try:
            if name.startswith("config") and not weights_too:
                myrm_config(self.folder)
            elif name.startswith(("config", "model")):
                model = load_model(self.folder, dtype=self.torch.float32)
                ids = self.torch.ones(1, 4, dtype=self.torch.long)
                assert model(ids, ids).logits.shape == (1, 1)
            else:
                tokenizer = load_tokenizer(self.folder)
                render(tokenizer, [talk], RenderPolicy.infer(tokenizer))
        except RMError as error:
            return checked(error)
        return "taken"


class Cards(Base):
    """The RM card: read, and held against its folder and its model's answers."""

    def __init__(self, folder: Path) -> None:
        from tiny import tiny_rm
        from ups_rm.reward.card import CARD_FILE
        from ups_rm.reward.native import load_tokenizer

        self.folder = tiny_rm(folder / "rm", hidden_dims=(4,))
        self.file = self.folder / CARD_FILE
        self.good = json.loads(self.file.read_text(encoding="utf-8"))
        self.old = {key: value for key, value in self.good.items() if key not in ("digests", "pooling")} | {"format": 1}
        self.tokenizer = load_tokenizer(self.folder)

    def case(self, draw: random.Random) -> str:
        from ups_rm.reward.card import RMCard, verify_answers, verify_folder

        good = draw.choice((self.good, self.old, self.old))
        data = as_json(draw, mutate.mutated(draw, good) if draw.random() < 0.8 else good)
        data = mutate.damaged(draw, data) if draw.random() < 0.2 else data
        self.last = data
        self.file.write_bytes(data)
        try:
            card = RMCard.read(self.folder)
            assert card is not None
            verify_folder(card, self.folder, self.tokenizer)
            verify_answers(card, self.folder, [[golden.logit] for golden in card.golden], 1e-3)
        except RMError as error:
            return checked(error)
        card.to_json()
        return "taken"


def _server(folder: Path) -> Parser:
    from fuzz.http_server import Server

    return Server(folder)


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "rows": Rows,
    "recipe": Recipes,
    "parquet": Parquets,
    "card": Cards,
    "folder": Folders,
    "server": _server,
}
