"""One HTML file that needs nothing else: styles, scripts, words and data stand in it, and it asks no host.

The data is JSON, gzipped and in base64, opened by the browser's own DecompressionStream. Text of models gets into the
page as text nodes alone (assets/dom.js); beside that, the page's own policy (CSP) lets no script run but ours, named by
their hashes. So a damaged page knows itself, by these hashes and by the checksum in the gzip: it then says so and asks
to be made anew.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ups_rm import __version__
from ups_rm.durable import write_text
from ups_rm.errors import RunError
from ups_rm.report.run import GROUP_BYTES, read_run

MARK = '<meta name="generator" content="ups-rm report">'
"""By it a report of ours is known; stands in the first lines of the file."""
LARGEST = 4_800_000
"""Bytes of a page: below 5 MB."""
SCRIPTS = ("uplot/uPlot.iife.min.js", "dom.js", "charts.js", "answer.js", "curves.js", "groups.js", "pairs.js",
           "reward.js", "data.js", "recipe.js", "app.js")  # fmt: skip
STYLES = ("uplot/uPlot.min.css", "report.css")


def write_report(runs: Sequence[Path], out: Path | None = None, *, study: dict[str, Any] | None = None) -> Path:
    """Write the page of one run, or of several to be compared, beside its name and rename it.

    Args:
        runs: run folders; the first one is shown first.
        out: the file; default `report.html` in the first run's folder.
        study: what `ups_rm.study` found: `tables` (`heads`, `rows`) and `picture`, a PNG as a data URL.

    Returns:
        The file.

    Raises:
        RunError: a folder is not a run's; the file is there and is not a report of ours, or can't be written.
    """
    out = Path(out) if out is not None else Path(runs[0]) / "report.html"
    _check_ours(out)
    html = render_runs(runs, study)
    try:
        write_text(out, html)
    except OSError as error:
        raise RunError(f"the report can't be written to {out}: {error}") from error
    return out


def _check_ours(out: Path) -> None:
    if out.is_dir():
        raise RunError(f"{out} is a folder\n  fix: --out FILE.html")
    if out.exists() and MARK.encode() not in out.read_bytes()[:2000]:
        raise RunError(f"{out} is not a report of ours: nothing is overwritten\n  fix: another --out")


def render_runs(runs: Sequence[Path], study: dict[str, Any] | None = None) -> str:
    """The page of these run folders, with as much of their group logs as leaves it under `LARGEST` bytes."""
    group_bytes = GROUP_BYTES // len(runs)
    while True:
        read = [read_run(run, group_bytes=group_bytes) for run in runs]
        if len({run["name"] for run in read}) < len(read):  # as in a study: arm/seed-0 and so on
            for one, run in zip(read, runs, strict=True):
                one["name"] = "/".join(Path(run).resolve().parts[-2:])
        html = render(read, study)
        if len(html.encode()) <= LARGEST or group_bytes < 10_000:
            return html
        group_bytes = int(group_bytes * 0.8 * min(1.0, LARGEST / len(html.encode())))


def render(runs: list[dict[str, Any]], study: dict[str, Any] | None = None) -> str:
    """The page with these runs (`read_run`) in it."""
    return frame(pack_runs(runs, live=False, study=study), title=", ".join(run["name"] for run in runs), live=False)


def pack_runs(runs: list[dict[str, Any]], *, live: bool, study: dict[str, Any] | None = None) -> bytes:
    """What the page's script reads: the runs, and every word it needs."""
    return pack({"labels": labels(), "live": live, "version": __version__, "runs": runs, "study": study})


def frame(payload: bytes, *, title: str, live: bool) -> str:
    """The page around the packed data; `live`: it asks its server for news."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("ups_rm.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    style = "\n".join(_asset(name) for name in STYLES)
    script = "\n".join(_asset(name) for name in SCRIPTS)
    return environment.get_template("report.html.jinja").render(
        mark=Markup(MARK),
        title=title,
        policy=_policy(script, style, live=live),
        style=Markup(style),  # ours, from this package
        script=Markup(script),
        payload=payload.decode(),
    )


def pack(content: dict[str, Any]) -> bytes:
    """JSON, gzipped and in base64; equal content gives equal bytes."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 9, mtime=0))


@cache
def labels() -> dict[str, dict[str, str]]:
    """Every word of the page by its key: {"en": ..., "zh": ...}."""
    found: dict[str, dict[str, str]] = json.loads(_asset("labels.json"))
    return found


@cache
def _asset(name: str) -> str:
    return (files("ups_rm.report") / "assets" / name).read_text(encoding="utf-8")


def _policy(script: str, style: str, *, live: bool) -> str:
    """Content-Security-Policy: these two texts and nothing else; a live page may ask the server it came from."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    server = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; img-src data:; "
        f"connect-src {server}; base-uri 'none'; form-action 'none'"
    )
