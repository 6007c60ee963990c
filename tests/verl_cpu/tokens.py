"""Keeps what verl computed token by token, for comparison: its metrics and dumps hold sums and means only.

Loaded in every process by VERL_USE_EXTERNAL_MODULES. What our trainer reads out of verl's TransferQueue at the end of a
step is written to VERL_CPU_TOKENS, one line per reply; nothing is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ups_rm.distributed import step_record

COLUMNS = ("prompts", "responses", "rm_scores", "token_level_rewards", "advantages", "old_log_probs", "ref_log_prob")

read_step = step_record.read_step


def read_and_keep(
    rows: Any, keys: Sequence[str], tags: Sequence[Mapping[str, Any]], *rest: Any, **settings: Any
) -> Any:
    columns = {name: [row.tolist() for row in rows[name].unbind()] for name in COLUMNS}
    with Path(os.environ["VERL_CPU_TOKENS"]).open("a", encoding="utf-8") as file:
        for i, tag in enumerate(tags):
            if not tag.get("is_padding", False):
                row = {name: values[i] for name, values in columns.items()}
                file.write(json.dumps({"weights": tag["max_global_steps"]} | row) + "\n")
    return read_step(rows, keys, tags, *rest, **settings)


step_record.read_step = read_and_keep
