"""From the recipe's `reward_model` section to a scorer: the one place where reward models are opened.

Training on one machine, evaluation, verl's reward workers and the server all call `open_scorer`. One `myrm` folder with
the default transform is a `RewardScorer`; anything else is a `CombinedScorer` around what each entry names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ups_rm.errors import RecipeError, RMError
from ups_rm.recipe import RewardModel, RewardModelModel
from ups_rm.reward.combined import CombinedScorer, Member, measured
from ups_rm.reward.helpfulness import HelpfulnessModel, WithHelpfulness
from ups_rm.reward.transforms import unsafety_logit
from ups_rm.types import Conversation, Message, Scorer

REFERENCE_PROMPTS = 64
"""Prompts of `reward_model.reference_data` that models are normalised on, two replies each."""
EXAMINED = ("myrm", "sequence", "token")
"""Kinds that the doctor opens and examines; the others it asks from outside."""
MAX_WAIT_S = 1800.0
"""Least time in seconds until a service that does not answer is given up, tries and pauses together."""
SERVICE_S = 15.0
"""Within which `ask_service` must have its answer, in seconds; it asks twice."""
KIND_OF = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}


def open_scorer(settings: RewardModel, device: str = "cpu") -> Scorer:
    """The scorer of a recipe; with `reward_model.helpfulness` it asks that model, too.

    Args:
        settings: `recipe.reward_model`.
        device: of models that are loaded here.

    Raises:
        RecipeError: no reward model is named. RMError: one can't be opened, or can't be normalised; by its name.
    """
    entries = settings.entries()
    if not entries:
        raise RecipeError(
            "reward_model.model.path is empty\n"
            "  fix: give an RM folder (REWARD_MODEL_PATH=FOLDER) or reward_model.models, or use `ups-rm run`, which "
            "makes one"
        )
    names = entry_names(entries)
    normalized = [normalization(entry, len(entries)) for entry in entries]
    reference = reference_conversations(settings.reference_data) if "reference" in normalized else []
    members = []
    for entry, name, how in zip(entries, names, normalized, strict=True):
        try:
            scorer = open_entry(entry, device, settings.max_batch_tokens, timeout_s=settings.timeout_s)
        except RMError as error:
            raise RMError(f"reward model {name}: {error}" if len(entries) > 1 else str(error)) from error
        member = Member(name, scorer, entry.output, entry.weight)
        if how == "reference":
            mean, std = measured(member, reference)
            member = replace(member, mean=mean, std=std)
        elif how == "fixed":
            member = replace(member, mean=entry.mean, std=entry.std)
        members.append(member)
    alone = members[0]
    safety: Scorer = CombinedScorer(members, transform=settings.transform, temperature=settings.transform_temperature)
    if len(members) == 1 and settings.transform == "sigmoid" and (alone.output, normalized[0]) == ("unsafety", "none"):
        safety = alone.scorer
    if not settings.helpfulness.named:
        return safety
    return WithHelpfulness(safety, open_helpfulness(settings.helpfulness, device, settings.max_batch_tokens))


def open_helpfulness(entry: RewardModelModel, device: str, max_batch_tokens: int) -> HelpfulnessModel:
    """What `reward_model.helpfulness` names: a folder of ours with a helpfulness head, or any model whose number is
    higher for better replies (`output` reward or safety).

    Raises:
        RMError: it can't be opened; a folder of ours without a helpfulness head.
    """
    name = entry_names([entry])[0]
    try:
        if kind_of(entry) == "myrm":
            from ups_rm.reward.scorer import RewardScorer

            how = loading(entry, device, max_batch_tokens)
            folder = RewardScorer.load(entry.path, safety=False, **how)
            if "helpfulness" not in folder.heads:
                raise RMError(
                    f"{entry.path} has no helpfulness head (config.json, heads)\n"
                    "  fix: ups-rm rm train --target helpfulness, then ups-rm rm merge"
                )
            return HelpfulnessModel(name, folder.helpfulness)
        scorer = open_entry(entry, device, max_batch_tokens)
    except RMError as error:
        raise RMError(f"reward_model.helpfulness: {error}") from error

    def ask(conversations: list[Conversation]) -> list[float]:
        return [
            -unsafety_logit(score.logit, entry.output) if score.helpfulness is None else score.helpfulness
            for score in scorer.score(conversations)
        ]

    return HelpfulnessModel(name, ask)


def loading(entry: RewardModelModel, device: str, max_batch_tokens: int) -> dict[str, Any]:
    """How an entry's folder is loaded: arguments of `RewardScorer.load` and `load_hf_scorer`."""
    return {
        "device": device,
        "dtype": entry.dtype,
        "trust_remote_code": entry.trust_remote_code,
        "max_batch_tokens": max_batch_tokens,
        "chat_template": template_of(entry),
    }


def open_entry(
    entry: RewardModelModel,
    device: str,
    max_batch_tokens: int,
    *,
    template: str | None = None,
    timeout_s: float = RewardModel.timeout_s,
) -> Scorer:
    """What one entry names, in its own sign and scale.

    Args:
        template: is used instead of the entry's file.
        timeout_s: seconds that a call of a function, or one request to a service, may take; models that are loaded
            here have no limit.

    Raises:
        RMError: it can't be opened.
    """
    kind = kind_of(entry)
    if kind == "function":
        from ups_rm.reward.function import FunctionScorer

        return FunctionScorer(entry.callable, timeout_s=timeout_s)
    if kind == "http":
        from ups_rm.reward.client import HttpScorer

        patience = max(MAX_WAIT_S, 3 * timeout_s)
        return HttpScorer(entry.url, token=token_of(entry), timeout=timeout_s, max_wait=patience)
    if kind == "pairwise":
        return _open_pairwise(entry, device, max_batch_tokens, template)
    how = loading(entry, device, max_batch_tokens)
    if template:
        how["chat_template"] = template
    if kind == "myrm":
        from ups_rm.reward.scorer import RewardScorer

        return RewardScorer.load(entry.path, **how)
    from ups_rm.reward.hf_scorer import load_hf_scorer

    return load_hf_scorer(entry.path, kind, **how)


def kind_of(entry: RewardModelModel) -> str:
    """The entry's kind; `auto` looks at what is given, and for a folder at its config.json.

    Raises:
        RMError: a folder of another architecture.
    """
    if entry.kind != "auto":
        return entry.kind
    if entry.callable or entry.url:
        return "function" if entry.callable else "http"
    from ups_rm.reward.native import read_config

    config = read_config(entry.path)
    if "hidden_dim_str" in config:
        return "myrm"
    architecture = str((config.get("architectures") or [""])[0])
    for ending, kind in KIND_OF.items():
        if architecture.endswith(ending):
            return kind
    raise RMError(
        f"{entry.path}/config.json: architecture {architecture or 'unknown'} is no reward model that is known "
        "here: folders of `ups-rm rm merge`, ...ForSequenceClassification and ...ForTokenClassification of one label\n"
        "  fix: reward_model.model.kind (a judge of pairs is kind=pairwise), or kind=function with a function of yours"
    )


def files_of(entry: RewardModelModel) -> list[Path | str]:
    """Local files and folders that decide what the entry answers; of a function its module's file."""
    files: list[Path | str] = [file for file in (entry.path, entry.template, entry.reference_replies) if file]
    if entry.callable:
        from importlib.util import find_spec

        try:
            found = find_spec(entry.callable.split(":")[0])
        except ImportError:
            found = None  # opening it says what is wrong
        if found is not None and found.origin and Path(found.origin).is_file():
            files.append(Path(found.origin))
    return files


def inputs_of(settings: RewardModel) -> list[Path | str]:
    """Files, folders and ids that decide what the reward models of a recipe answer; of normalised ones also the rows
    that they are normalised on."""
    from ups_rm.data.rows import resolve_source

    entries = settings.entries()
    files = [file for entry in settings.asked() for file in files_of(entry)]
    if any(normalization(entry, len(entries)) == "reference" for entry in entries):
        files.append(resolve_source(settings.reference_data))
    return files


def entry_names(entries: Sequence[RewardModelModel]) -> list[str]:
    """A name for each entry: its own, or the last part of what it points to; numbered where two would be alike."""
    names: list[str] = []
    for entry in entries:
        last = Path(entry.path or entry.url).name or "model"
        name = entry.name or (entry.callable.replace(":", ".") if entry.callable else last)
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def normalization(entry: RewardModelModel, count: int) -> str:
    """reference, fixed or none: what `normalize=auto` comes to in a list of `count` models.

    A `reward` has no zero, so a sigmoid of it alone could be flat everywhere; a preference between replies has one.
    """
    if entry.normalize != "auto":
        return entry.normalize
    return "reference" if count > 1 or (entry.output == "reward" and entry.kind != "pairwise") else "none"


def reference_conversations(source: str) -> list[Conversation]:
    """The first distinct prompts of `source` with both their replies, in the order of the rows.

    Raises:
        DataError: a source that can't be read. RMError: it has no rows.
    """
    from ups_rm.data.rows import good_rows

    pairs: dict[str, list[Conversation]] = {}
    for row in good_rows(source):
        if len(pairs) == REFERENCE_PROMPTS:
            break
        if row.prompt not in pairs:
            ask = Message(role="user", content=row.prompt)
            pairs[row.prompt] = [[ask, Message(role="assistant", content=reply)] for reply in row.responses]
    if not pairs:
        raise RMError(f"reward_model.reference_data={source} has no rows to normalise reward models on")
    return [conversation for pair in pairs.values() for conversation in pair]


def _open_pairwise(entry: RewardModelModel, device: str, max_batch_tokens: int, template: str | None) -> Scorer:
    from ups_rm.reward.pairwise import FunctionJudge, ModelJudge, PairJudge, PairwiseScorer, read_references

    judge: PairJudge
    if entry.callable:
        judge = FunctionJudge(entry.callable)
    else:
        judge = ModelJudge.load(
            entry.path,
            output=entry.output,
            device=device,
            dtype=entry.dtype,
            trust_remote_code=entry.trust_remote_code,
            max_batch_tokens=max_batch_tokens,
            template=template or template_of(entry),
        )
    references = read_references(Path(entry.reference_replies)) if entry.reference_replies else None
    return PairwiseScorer(judge, references)


def template_of(entry: RewardModelModel) -> str | None:
    """The text of the entry's template file; None if it names none. Raises RMError when it can't be read."""
    if not entry.template:
        return None
    try:
        return Path(entry.template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RMError(f"template {entry.template} can't be read: {error}") from error


def token_of(entry: RewardModelModel) -> str | None:
    """The service's token, from the environment variable that the entry names.

    Raises:
        RMError: it is not set.
    """
    if not entry.token_env:
        return None
    token = os.environ.get(entry.token_env)
    if not token:
        raise RMError(f"the environment variable {entry.token_env} (token_env) is not set: {entry.url} needs its token")
    return token


def ask_service(entry: RewardModelModel) -> None:
    """Have a service score one conversation, as it will have to: it lives, it takes our token, it speaks our protocol.

    Raises:
        RMError, RMServerError: it does not, or something else is at its address.
    """
    from ups_rm.reward.client import HttpScorer

    conversation = [Message(role="user", content="Hello."), Message(role="assistant", content="Hello.")]
    with HttpScorer(entry.url, token=token_of(entry), timeout=SERVICE_S, retries=1, max_wait=3 * SERVICE_S) as service:
        service.score([conversation])
