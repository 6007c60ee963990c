"""The names in PKU-SafeRLHF rows and the arrow schema of verl's prompt parquet. Constants only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

SUBSETS = ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")

HARM_CATEGORIES = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
)

MAX_SEVERITY = 3

DATA_SOURCE = "PKU-SafeRLHF"
ABILITY = "safety"


def verl_schema(*, with_prompt_source: bool, with_categories: bool = False) -> pa.Schema:
    """The columns of train.parquet and val.parquet, as verl's RLHFDataset reads them.

    `extra_info.prompt_source` stands there only when some row says what kind of prompt it is (`KINDS` in prompts.py),
    so that rows of the original data give exactly the six fields users know. `extra_info.categories` names the harms
    that are flagged in either response, where that is asked for.
    """
    import pyarrow as pa

    extra_info = [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("is_response_0_safe", pa.bool_()),
        ("is_response_1_safe", pa.bool_()),
        ("safer_response_id", pa.int64()),
        ("better_response_id", pa.int64()),
    ]
    if with_prompt_source:
        extra_info.append(("prompt_source", pa.string()))
    if with_categories:
        extra_info.append(("categories", pa.list_(pa.string())))
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.null())])),
            ("extra_info", pa.struct(extra_info)),
        ]
    )
