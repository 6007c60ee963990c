"""Stages that make the prompts: `prepare`, and `prepare-benign` for the harmless ones of the sample."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ups_rm.data.prompts import Kind
from ups_rm.durable import publishing, remove_file
from ups_rm.errors import DataError, RunError
from ups_rm.pipeline.context import Run, source_of
from ups_rm.recipe import as_list
from ups_rm.stages import Stage

BENIGN_FOLDER = Path("Data/benign_verl")


def make_prompts(this: Run) -> None:
    """Train and validation prompts of the recipe's rows; the harmless ones are added to what the recipe names."""
    from ups_rm.data.prepare import prepare

    settings = this.recipe.prepare
    train, val = (Path(as_list(files)[0]) for files in (this.recipe.data.train_files, this.recipe.data.val_files))
    if train.parent != val.parent or (train.name, val.name) != ("train.parquet", "val.parquet"):
        raise RunError(
            f"prepare writes train.parquet and val.parquet into one folder, but the recipe names {train} and {val}\n"
            "  fix: set both TRAIN_DATA and VAL_DATA to use files that you have"
        )

    def action() -> None:
        prepare(
            settings.source,
            train.parent,
            subsets=settings.subsets or None,
            train_ratio=settings.train_ratio,
            shuffle=settings.shuffle,
            seed=settings.seed,
            dedup=None if settings.dedup == "none" else settings.dedup,
            group_split=settings.group_split,
            categories=tuple(settings.categories),
            max_rows=None if settings.max_rows < 0 else settings.max_rows,
            max_bad=settings.max_bad,
            keep_categories=True,
            progress=True,
        )

    this.do(
        Stage(
            name="prepare",
            inputs=[source_of(settings.source)],
            settings={key: value for key, value in asdict(settings).items() if key != "benign_source"},
            out=train.parent,
            outputs=[train, val],
            action=action,
        )
    )
    if settings.benign_source == "none":
        return
    files = [BENIGN_FOLDER / "train.parquet", BENIGN_FOLDER / "val.parquet"]
    this.do(
        Stage(
            name="prepare-benign",
            inputs=[source_of(settings.benign_source)],
            settings={},
            out=BENIGN_FOLDER,
            outputs=files,
            action=lambda: prepare_kind(settings.benign_source, BENIGN_FOLDER, "benign"),
        )
    )
    this.recipe.data.train_files = [str(train), str(files[0])]
    this.recipe.data.val_files = [str(val), str(files[1])]


def prepare_kind(source: str, out: Path, kind: Kind) -> None:
    """`prepare`, but only the prompts of one kind (by `extra_info.prompt_source`) are kept.

    The report.json that `prepare` leaves beside them speaks of all rows, so it goes.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from ups_rm.data.prepare import REPORT, prepare

    prepare(source, out, keep_categories=True)
    remove_file(out / REPORT)
    for name in ("train.parquet", "val.parquet"):
        table = pq.read_table(out / name)
        info = table["extra_info"].combine_chunks()
        names = [info.type.field(i).name for i in range(info.type.num_fields)]
        if "prompt_source" not in names:
            raise DataError(f"{source}: its rows have no prompt_source, so harmless prompts can't be told apart")
        table = table.filter(pc.ends_with(pc.struct_field(info, "prompt_source"), kind))
        if table.num_rows == 0:
            raise DataError(f"{source}: no row's prompt_source ends in {kind!r}")
        with publishing(out / name) as temporary:
            pq.write_table(table, temporary)
