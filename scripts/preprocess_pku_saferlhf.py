#!/usr/bin/env python3
"""PKU-SafeRLHF -> train.parquet and val.parquet in verl's schema, with the flags that users know.

    python3 scripts/preprocess_pku_saferlhf.py --subsets Alpaca3-8B --shuffle --seed 42

`ups-rm data prepare` does the same and more (deduplication, splits by prompt, filters).
"""

from __future__ import annotations

import argparse
import sys

from ups_rm.console import console
from ups_rm.data.prepare import prepare
from ups_rm.data.tables import prepare_table, stats_tables
from ups_rm.exits import guarded, show_tracebacks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--local_dataset_path", default="Data/PKU-SafeRLHF", help="folder of the data set (%(default)s)"
    )
    parser.add_argument("--local_save_dir", default="Data/pku_saferlhf_verl", help="output folder (%(default)s)")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="subsets to read (default: all three)")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the rows of each file")
    parser.add_argument("--seed", type=int, default=42, help="seed of the shuffle (%(default)s)")
    parser.add_argument(
        "--train_ratio", type=float, default=0.9, help="train share if there are no test rows (%(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    show_tracebacks(args.debug)
    report = prepare(
        args.local_dataset_path,
        args.local_save_dir,
        subsets=args.subsets,
        shuffle=args.shuffle,
        seed=args.seed,
        train_ratio=args.train_ratio,
        progress=True,
    )
    console.print(stats_tables(report.stats), prepare_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
