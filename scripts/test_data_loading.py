#!/usr/bin/env python3
"""Checks that a prompt parquet can be trained on, and shows its first row. Exit code 1 if it can't.

python3 scripts/test_data_loading.py --parquet_path Data/pku_saferlhf_verl/train.parquet
"""

from __future__ import annotations

import argparse
import json
import sys

from ups_rm.console import console
from ups_rm.data.check import check_parquet
from ups_rm.data.prompts import read_prompts
from ups_rm.data.tables import print_check
from ups_rm.exits import CHECK_FAILED, guarded, show_tracebacks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet_path", default="Data/pku_saferlhf_verl/train.parquet", help="file (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    show_tracebacks(args.debug)
    result = check_parquet([args.parquet_path])
    print_check(result, console)
    if not result.ok:
        return CHECK_FAILED
    first = read_prompts(args.parquet_path)[0]
    console.print("first row:", json.dumps(first.messages, ensure_ascii=False), markup=False, soft_wrap=True)
    console.print("extra_info:", json.dumps(first.extra_info, ensure_ascii=False), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
