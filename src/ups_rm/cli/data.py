"""`ups-rm data prepare | check | stats`: rows in, prompt parquet out, and a look at both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ups_rm.exits import CHECK_FAILED

app = typer.Typer(no_args_is_help=True, help="SafeRLHF rows -> verl parquet; checks and statistics.")

DEFAULT_SOURCE = "Data/PKU-SafeRLHF"
DEFAULT_OUT = Path("Data/pku_saferlhf_verl")

Source = Annotated[
    str,
    typer.Argument(
        help="Folder with data/<subset>/{train,test}.jsonl (.jsonl.gz, .parquet), one such file, a file of "
        "{prompt, safe_response, unsafe_response}, a Hub id, or the word `sample`.",
        show_default=True,
    ),
]
Subsets = Annotated[
    list[str] | None,
    typer.Option("--subsets", metavar="NAMES", help="Subset folders to read, with commas between. Default: all."),
]
MaxBad = Annotated[float, typer.Option(help="Largest share of unusable rows that is tolerated.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No tables, no progress bar.")]


def _names(given: list[str] | None) -> list[str] | None:
    """An option that may come several times, each with several names between commas."""
    return [name.strip() for text in given for name in text.split(",") if name.strip()] if given else None


@app.command(
    epilog="Example: ups-rm data prepare Data/PKU-SafeRLHF --out Data/pku_saferlhf_verl --dedup prompt --group-split"
)
def prepare(
    source: Source = DEFAULT_SOURCE,
    out: Annotated[Path, typer.Option(help="Folder for train.parquet, val.parquet, rejected.jsonl.")] = DEFAULT_OUT,
    subsets: Subsets = None,
    train_ratio: Annotated[
        float, typer.Option(help="Share of rows that stay train when there are no test rows.")
    ] = 0.9,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Permute the rows of each file.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 42,
    dedup: Annotated[str | None, typer.Option(help="`prompt`: keep only the first row of each prompt.")] = None,
    group_split: Annotated[bool, typer.Option("--group-split", help="No prompt in both files.")] = False,
    categories: Annotated[
        list[str] | None,
        typer.Option(
            "--categories", metavar="NAMES", help="Keep rows flagged with one of these harms (commas between)."
        ),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="At most this many rows in each file.")] = None,
    max_bad: MaxBad = 0.001,
    keep_categories: Annotated[
        bool,
        typer.Option("--keep-categories", help="Add extra_info.categories, the harms flagged in either response."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Turn SafeRLHF rows into train.parquet and val.parquet in verl's schema."""
    from ups_rm.console import console
    from ups_rm.data.prepare import prepare as run
    from ups_rm.data.tables import prepare_table, stats_tables

    report = run(
        source,
        out,
        subsets=_names(subsets),
        train_ratio=train_ratio,
        shuffle=shuffle,
        seed=seed,
        dedup=dedup,
        group_split=group_split,
        categories=_names(categories) or (),
        max_rows=max_rows,
        max_bad=max_bad,
        keep_categories=keep_categories,
        progress=not quiet,
    )
    if quiet:
        return
    console.print(stats_tables(report.stats))
    console.print(prepare_table(report))
    console.print(f"prompts in both files: {report.shared_prompts:,}", soft_wrap=True)
    if report.split_from_train:
        console.print("there were no test rows: validation is the last part of the train rows", soft_wrap=True)


@app.command(
    epilog="Example: ups-rm data check Data/pku_saferlhf_verl/train.parquet Data/pku_saferlhf_verl/val.parquet"
)
def check(
    files: Annotated[list[Path], typer.Argument(help="Prompt parquet files; a folder means all in it.")],
) -> None:
    """Check prompt parquet against verl's schema. Exit code 1 if it can't be trained on."""
    from ups_rm.console import console
    from ups_rm.data.check import check_parquet
    from ups_rm.data.tables import print_check
    from ups_rm.errors import DataError

    paths: list[Path] = []
    for path in files:
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: has no .parquet file\n  fix: ups-rm data prepare SOURCE --out {path}")
        paths += found
    result = check_parquet(paths)
    print_check(result, console)
    if not result.ok:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog="Example: ups-rm data stats sample --plot stats.png")
def stats(
    source: Source = DEFAULT_SOURCE,
    subsets: Subsets = None,
    plot: Annotated[Path, typer.Option(help="Where the picture goes; .png, .svg or .pdf.")] = Path("data_stats.png"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Print the tables only.")] = False,
    max_bad: MaxBad = 0.001,
) -> None:
    """Count rows, prompts, labels, contradictions and categories; print tables and write a plot."""
    from ups_rm.console import console
    from ups_rm.data.reading import source_stats
    from ups_rm.data.tables import plot_stats, stats_tables

    found = source_stats(source, subsets=_names(subsets), max_bad=max_bad, progress=True)
    console.print(stats_tables(found))
    if not no_plot:
        plot_stats(found, plot)
        console.print(f"plot: {plot}", soft_wrap=True)
