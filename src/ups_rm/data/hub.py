"""Data sets on the Hugging Face Hub as a source, streamed through `datasets`: nothing is downloaded as a whole.

A configuration is a subset: `Alpaca-7B` of the published set is the configuration `alpaca-7b`, so names are compared
without regard to case. Where no configuration is asked for by name, the published three are taken if they exist, else
the default one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ups_rm.data.schema import SPLITS, SUBSETS, Split
from ups_rm.data.sources import Part, Record
from ups_rm.errors import DataError

# what the Hub and its transports raise when a data set can't be found, reached or parsed
_HUB_ERRORS = (OSError, ValueError, RuntimeError, LookupError)


def hub_parts(hub_id: str, *, split: Split | None = None, subsets: Sequence[str] | None = None) -> list[Part]:
    """The parts of a Hub data set, subset by subset. Raises DataError when it or a named subset is not there."""
    from datasets import get_dataset_config_names

    try:
        configs = {name.lower(): name for name in get_dataset_config_names(hub_id)}
    except _HUB_ERRORS as error:
        raise _unreachable(hub_id, error) from error
    if subsets:
        missing = [name for name in subsets if name.lower() not in configs]
        if missing:
            raise DataError(
                f"hub:{hub_id}: no configuration for subset {', '.join(missing)}; there are "
                f"{', '.join(configs.values())}"
            )
    chosen = subsets or [name for name in SUBSETS if name.lower() in configs]
    pairs = [(name, configs[name.lower()]) for name in chosen] or [("", _default_config(configs))]
    return [
        Part(subset=name, split=one, hub_id=hub_id, config=config)
        for one in ([split] if split else SPLITS)
        for name, config in pairs
        if one in _split_names(hub_id, config)
    ]


def _default_config(configs: dict[str, str]) -> str:
    return configs.get("default") or next(iter(configs.values()))


def _split_names(hub_id: str, config: str) -> list[str]:
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(hub_id, config))
    except _HUB_ERRORS as error:
        raise _unreachable(hub_id, error) from error


def iter_hub(part: Part) -> Iterator[Record]:
    """Streams one configuration and split; a row's line number is its position, from 1."""
    from datasets import load_dataset

    number = 0
    try:
        rows: Any = load_dataset(part.hub_id, part.config, split=part.split, streaming=True)
        for value in rows:
            number += 1
            yield Record(number, value=value)
    except _HUB_ERRORS as error:
        raise DataError(f"{part.name}: reading failed after row {number}: {_first_line(error)}") from error


def _unreachable(hub_id: str, error: BaseException) -> DataError:
    return DataError(
        f"{hub_id}: is no local path, and no data set of this name could be opened on the Hub: {_first_line(error)}\n"
        "  fix: check the spelling and the connection, or download it and give the folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
