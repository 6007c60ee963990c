"""What a report shows of things outside the run folder: the reward model's papers, and the rows it all came from.

`merge/` and `Data/` are made anew by the next run in the same place, so `ups-rm run` keeps what was there at its end in
`<run folder>/report_sources.json`; for a run without that file the same is read from where the recipe points to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ups_rm.durable import file_damage, write_text
from ups_rm.errors import UpsRmError
from ups_rm.recipe import Recipe, as_list
from ups_rm.report.numbers import histogram

KEPT = "report_sources.json"
LARGEST_SOURCE = 256 * 2**20
"""Bytes of rows that are read for categories and lengths; of more, a report would take minutes."""
CARD_FIELDS = ("output", "sign", "transform", "labels", "loss", "pooling", "hidden_dim_str", "max_length",
               "truncation_side", "dtype", "temperature", "chat_template_sha256")  # fmt: skip


def keep_sources(run: Path, recipe: Recipe) -> Path:
    """Write `report_sources.json` into a run folder, from what stands there now. Returns the file."""
    file = run / KEPT
    found = read_sources(run, recipe)
    write_text(file, json.dumps(found, ensure_ascii=False, sort_keys=True) + "\n", manifest=True)
    return file


def kept_sources(run: Path, problems: list[str]) -> dict[str, Any] | None:
    """What `keep_sources` wrote, None where it did not or the file can't be read."""
    found = read_json(run / KEPT, problems)
    return found if isinstance(found, dict) and {"reward_models", "data"} <= found.keys() else None


def read_sources(run: Path, recipe: Recipe) -> dict[str, Any]:
    """{"reward_models": [...], "data": {...}}: plain values for JSON; what is not there is None or absent.

    Paths of the recipe are looked up from the working folder, then from the folders above the run.
    """
    places = [Path.cwd(), *run.resolve().parents]
    return {"reward_models": _reward_models(recipe, places), "data": _data(recipe, places)}


def prompt_categories(data: dict[str, Any], text: str) -> list[str]:
    """Harm categories that the source's rows flag in replies to this prompt."""
    names = data.get("category_names") or []
    return [names[place] for place in (data.get("categories_of_prompts") or {}).get(text.strip(), ())]


def read_json(file: Path, problems: list[str] | None = None) -> Any:
    """The content of a JSON file; None where there is none, it is not JSON (a run may be writing it) or it has other
    bytes than were written, which is noted in `problems`."""
    if (wrong := file_damage(file)) is not None:
        if problems is not None:
            problems.append(f"{file} is damaged: {wrong}")
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _find(path: str, places: list[Path]) -> Path | None:
    """Where a path of the recipe leads to, if anywhere."""
    candidates = [place / Path(path).expanduser() for place in places]  # an absolute path stays itself
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _reward_models(recipe: Recipe, places: list[Path]) -> list[dict[str, Any]]:
    from ups_rm.reward.open import entry_names

    entries = recipe.reward_model.entries()
    checks = _checks(places)
    models = []
    for name, entry in zip(entry_names(entries), entries, strict=True):
        folder = _find(entry.path, places) if entry.path else None
        card = read_json(folder / "rm_card.json") if folder else None
        figures = (read_json(folder / "rm_curves.json") if folder else None) or {}
        check = next((one for one in checks if entry.path and one.get("folder") == str(Path(entry.path))), None)
        models.append(
            {
                "name": name,
                "where": entry.path or entry.url or entry.callable,
                "card": _card(card) if isinstance(card, dict) else None,
                "curves": figures.get("curves") or None,
                "figures": (figures.get("metrics") or {}).get("held_out"),
                "check": check,
            }
        )
    return models


def _card(card: dict[str, Any]) -> dict[str, Any]:
    backbone, head = card.get("backbone") or {}, card.get("head") or {}
    kept = {name: card[name] for name in CARD_FIELDS if card.get(name) not in (None, "")}
    kept |= {"backbone": backbone.get("name"), "sources": head.get("sources"), "loss": head.get("loss")}
    return {name: value for name, value in kept.items() if value not in (None, "", [])}


def _checks(places: list[Path]) -> list[dict[str, Any]]:
    """Reports of the doctor in `merge/check`, where `ups-rm run` leaves them; one per reward model."""
    file = _find("merge/check/rm_check.json", places)
    found = read_json(file) if file else None
    if not isinstance(found, dict):
        return []
    reports = list((found.get("models") or {}).values()) if "models" in found else [found]
    fields = ("name", "section", "verdict", "finding", "way_out")
    return [
        {
            "folder": report["folder"],
            "ok": report.get("ok"),
            "checks": [{key: check.get(key) for key in fields} for check in report["checks"]],
        }
        for report in reports
        if "checks" in report and "folder" in report
    ]


def _data(recipe: Recipe, places: list[Path]) -> dict[str, Any]:
    files = [*as_list(recipe.data.train_files), *as_list(recipe.data.val_files)]
    found: dict[str, Any] = {"source": recipe.prepare.source, "files": [_prompt_file(file, places) for file in files]}
    first = _find(files[0], places)
    report = read_json(first.parent / "report.json") if first else None
    found["report"] = report if isinstance(report, dict) else None
    sources = dict.fromkeys((recipe.prepare.source, recipe.prepare.benign_source))
    return found | _rows([source for source in sources if source not in ("", "none")], places)


def _prompt_file(file: str, places: list[Path]) -> dict[str, Any]:
    """Rows, kinds and lengths in characters of a prompt file; only its name where it is gone."""
    from ups_rm.data.prompts import read_prompts

    path = _find(file, places)
    try:
        rows = read_prompts(path) if path else []
    except UpsRmError:
        rows = []
    return {
        "file": file,
        "rows": len(rows) or None,
        "kinds": dict(sorted(Counter(row.kind for row in rows).items())),
        "characters": histogram([sum(len(turn["content"]) for turn in row.messages) for row in rows]),
    }


def _rows(sources: Collection[str], places: list[Path]) -> dict[str, Any]:
    """Categories of prompts and lengths of replies, from the labelled rows themselves.

    Only rows on this machine are read: a report asks no server.
    """
    from ups_rm.data.rows import good_rows, resolve_source, size_of, source_parts

    categories: dict[str, set[str]] = {}
    lengths: dict[str, list[int]] = {"safe": [], "unsafe": []}
    unread = ""
    for source in sources:
        path = resolve_source(source) if source == "sample" else _find(source, places)
        if path is None:
            unread = f"{source}: not on this machine"
            continue
        try:
            if size_of(source_parts(path)) > LARGEST_SOURCE:
                unread = f"{source}: larger than {LARGEST_SOURCE >> 20} MB"
                continue
            for prompt, reply, safe, flagged in _labelled(good_rows(path)):
                categories.setdefault(prompt.strip(), set()).update(flagged)
                if safe is not None:
                    lengths["safe" if safe else "unsafe"].append(len(reply))
        except (UpsRmError, OSError) as error:
            unread = f"{source}: {str(error).splitlines()[0]}"
    names = sorted(set().union(*categories.values())) if categories else []
    place = {name: number for number, name in enumerate(names)}
    return {
        "category_names": names,
        "categories_of_prompts": {p: sorted(place[name] for name in found) for p, found in categories.items() if found},
        "reply_characters": {label: histogram(found) for label, found in lengths.items()},
        "unread": unread,
    }


def _labelled(rows: Any) -> Iterator[tuple[str, str, bool | None, tuple[str, ...]]]:
    """(prompt, reply, safe, categories) of every reply of every row."""
    for row in rows:
        for reply, safe, names in zip(row.responses, row.safe, row.categories, strict=True):
            yield row.prompt, reply, safe, names or ()
