"""From a folder to a report: load it once, make every check whose ground has not given way, in a bounded time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import RMError
from ups_rm.reward.card import RMCard
from ups_rm.reward.doctor import (
    direction,
    last_token,
    loading,
    plan,
    reading,
    scale,
    speed,
    template,
    tricks,
    truncation,
)
from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Check, CheckReport
from ups_rm.reward.doctor.steps import Step, finding_of, make, skipped
from ups_rm.reward.native import heads_of, load_model, load_tokenizer, read_config, rm_folder
from ups_rm.reward.render import RenderPolicy
from ups_rm.reward.scorer import RewardScorer, check_judges_safety, default_max_length
from ups_rm.reward.transforms import unsafety_logit
from ups_rm.types import Conversation

LOADED, TEXT, READS = "loaded exactly", "template and BOS", "reads the right token"
_TOKENS = ("tokenizer", "bos token", "chat template", "end token")
_ANSWERS = (*_TOKENS, "weights", "vocabulary", "answers", "number range")
_READ = (*_ANSWERS, "bos", "finite")
_BATCH = (*_READ, "padding id")
_DATA = (*_BATCH, "last token", "right padding", "card", "head", "golden logits", "spread")

# only for classifiers of plain transformers: a folder of ours has no other forward than the one that is asked
LAST_TOKEN = Step(READS, "last token", last_token.last_token, _BATCH)
FAST: tuple[Step, ...] = (
    Step(LOADED, "weights", loading.weights),
    Step(LOADED, "index", loading.index),
    Step(LOADED, "tokenizer", loading.tokenizer),
    Step(LOADED, "vocabulary", loading.vocabulary, ("tokenizer",)),
    Step(TEXT, "bos token", template.bos_token, ("tokenizer",)),
    Step(TEXT, "chat template", template.chat_template, ("tokenizer", "bos token")),
    Step(TEXT, "end token", template.end_token, ("tokenizer", "bos token", "chat template")),
    Step(LOADED, "answers", plan.answers, (*_TOKENS, "weights", "vocabulary")),
    Step(LOADED, "number range", loading.number_range, (*_TOKENS, "weights", "vocabulary", "answers")),
    Step(TEXT, "bos", template.bos, _ANSWERS),
    Step(TEXT, "template", template.template, _TOKENS),
    Step(TEXT, "forged turns", template.forged_turns, _TOKENS),
    Step(TEXT, "policy tokenizer", template.policy_tokenizer, ("tokenizer",)),
    Step(LOADED, "card", loading.card, (*_TOKENS, "vocabulary", "bos")),
    Step(READS, "finite", reading.finite, _ANSWERS),
    Step(READS, "padding id", reading.padding_id, _READ),
    LAST_TOKEN,
    Step(LOADED, "head", loading.head, ("weights", "vocabulary", "answers", "last token")),
    Step(LOADED, "golden logits", loading.golden_logits, ("weights", "vocabulary", "answers", "number range", "head")),
    Step(READS, "right padding", reading.right_padding, _BATCH),
    Step(READS, "left padding", reading.left_padding, _BATCH),
    Step(READS, "batch", reading.batch, (*_BATCH, "right padding")),
    Step(READS, "order", reading.order, (*_BATCH, "right padding", "batch")),
    Step(READS, "missing end", reading.missing_end, _BATCH),
    Step(READS, "spread", reading.spread, (*_READ, "head")),
)
PLAIN = Step(LOADED, "plain transformers", loading.plain_transformers, _READ)
_TOLD = ("direction", "saturation")  # without them, no figure about the labels means anything
_RENDERED = ("end token", "bos", "template", "last token")  # read in another form than it was trained on
# only for a folder with a second head
HELPFULNESS = Step("direction", "helpfulness", direction.helpfulness, _DATA, (), _RENDERED)
FULL: tuple[Step, ...] = (
    Step(READS, "bfloat16", reading.bfloat16, (*_BATCH, "spread")),
    Step("truncation", "truncation", truncation.truncation, _DATA),
    Step("direction", "direction", direction.direction, _DATA, (), _RENDERED),
    HELPFULNESS,
    Step("scale", "saturation", scale.saturation, _DATA, (), _RENDERED),
    Step("scale", "groups", scale.groups, _DATA, ("saturation",), _RENDERED),
    Step("scale", "calibration", scale.calibration, (*_DATA, *_TOLD), (), (*_RENDERED, *_TOLD)),
    *(Step("cheap tricks", name, tricks.trick(name), _DATA, _TOLD, _RENDERED) for name in tricks.TRICKS),
    Step("speed", "speed", speed.speed, (*_TOKENS, "weights", "vocabulary", "answers")),
)


def check_rm(
    folder: Path | str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    kind: str = "auto",
    output: str = "unsafety",
    trust_remote_code: bool = False,
    plain: bool = False,
    chat_template: str | None = None,
    policy: Path | str | None = None,
    full: bool = False,
    pairs: Sequence[tuple[Conversation, Conversation]] | None = None,
    data: Path | str | None = None,
    max_pairs: int = 200,
    seconds: float = 60.0,
    plot: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> CheckReport:
    """Examine an RM: a folder of ours, a classifier of plain transformers with one logit, of either sign; or from
    outside a service (its address), a function (`module:callable`) or a judge of pairs.

    The fast part takes a second or two for a small RM; `full` about `seconds`.

    Args:
        folder: the folder, the service's address, or the function.
        dtype: "float32" shows the finest differences; "auto" is what training uses.
        kind: myrm, sequence, token, pairwise, function, http (`reward_model.model.kind`); "auto" looks at what is
            given, and never finds a judge of pairs.
        output: what its number means, unsafety, safety or reward (`reward_model.model.output`).
        trust_remote_code: examine the folder's own Python files instead of ours.
        plain: also load it through plain AutoModelForTokenClassification with the folder's code, and compare.
        chat_template: text of a template, for folders whose tokenizer has none; of a judge the text of a pair.
        policy: folder or hub id of the policy, whose tokenizer is compared.
        full: go on with labelled data.
        pairs: (safer, less safe) conversations; with them the full examination is made.
        data: labelled rows instead, see `labelled.read_labelled`. With neither, "sample".
        max_pairs: at most this many rows of the data.
        seconds: what it may take once it is loaded: a slow RM gets fewer rows, and `say` hears the estimate.
        plot: where the reliability diagram is written (PNG).

    Raises:
        DataError: `data` can't be read or has no labels. A model that can't be loaded is a failed check, no error.
        RMError: a kind or an output that is unknown; `plain` or `policy` for what is no folder of one logit.
    """
    from ups_rm.reward.doctor.labelled import pairs_of, read_labelled
    from ups_rm.reward.doctor.outside import check_outside, entry_of
    from ups_rm.reward.open import EXAMINED

    unsafety_logit(0.0, output)  # raises for an output that is unknown
    path, tell, labelled = Path(folder).expanduser(), say or (lambda _text: None), None
    device = str(torch_device(device))
    entry = entry_of(folder, kind, output=output, dtype=dtype, trust_remote_code=trust_remote_code)
    if entry.kind not in ("auto", *EXAMINED) and (plain or policy):
        raise RMError(f"kind is {entry.kind!r}: only folders with one logit are compared with plain code or a policy")
    if full or pairs or data is not None:
        labelled = pairs_of(pairs) if pairs else read_labelled(data or "sample", max_rows=max_pairs)
    if entry.kind not in ("auto", *EXAMINED):
        how = {"template": chat_template, "seconds": seconds, "plot": plot, "tell": tell}
        return check_outside(entry, str(folder), labelled, device=device, **how)  # type: ignore[arg-type]
    steps = [*FAST, *([PLAIN] if plain else []), *(FULL if labelled is not None else [])]
    try:
        exam, loaded = _load(path, kind, device, dtype, trust_remote_code, chat_template, tell)
    except RMError as error:
        finding, way_out = finding_of(error)
        way_out = way_out or "a whole folder: of ours `ups-rm rm merge` makes one from backbone and head"
        load = Check("fail", finding, way_out=way_out, name="load", section=LOADED)
        return CheckReport(
            path, dtype, (load, *(skipped(step, "load") for step in steps if step not in (LAST_TOKEN, HELPFULNESS)))
        )
    steps = [step for step in steps if step is not LAST_TOKEN or exam.kind != "myrm"]
    steps = [step for step in steps if step is not HELPFULNESS or "helpfulness" in exam.scorer.heads]
    exam.output = output
    exam.policy, exam.seconds, exam.plot = None if policy is None else str(policy), seconds, plot
    exam.data, exam.tell = labelled, tell
    exam.known["load"] = loaded
    for step in steps:
        exam.known[step.name] = make(step, exam)
    logits = tuple(exam.alone) if exam.known["finite"].verdict in ("pass", "fail") else ()
    order = list(dict.fromkeys(step.section for step in steps))
    checks = sorted(exam.known.values(), key=lambda check: order.index(check.section))
    return CheckReport(path, exam.dtype, tuple(checks), logits)


def _load(
    path: Path,
    kind: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    chat_template: str | None,
    tell: Callable[[str], None],
) -> tuple[Exam, Check]:
    """The folder without the card's verification: the card gets checks of its own."""
    from ups_rm.recipe import RewardModelModel
    from ups_rm.reward.hf_scorer import load_hf_scorer
    from ups_rm.reward.open import kind_of

    config = read_config(rm_folder(path))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if size > 2**31:
        tell(f"loading {size / 1e9:.1f} GB of weights")
    card, card_error = None, ""
    try:
        card = RMCard.read(path)
    except RMError as error:
        card_error = str(error)

    asked = kind_of(RewardModelModel(path=str(path), kind=kind))
    heads = heads_of(config, path) if asked == "myrm" else ("unsafety",)
    check_judges_safety(heads, path)
    how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "chat_template": chat_template}

    def load(name: str) -> RewardScorer:
        if asked != "myrm":
            return load_hf_scorer(path, asked, dtype=name, **how)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        number_format = compute_dtype(name, device)
        model = load_model(path, dtype=number_format, device=device, trust_remote_code=trust_remote_code)
        limit = default_max_length(config, tokenizer)
        policy = card.render if card else RenderPolicy.infer(tokenizer, max_length=limit)
        native = not trust_remote_code
        return RewardScorer(
            model, tokenizer, policy, card=card, device=device, dtype=number_format, native=native, heads=heads
        )

    exam = Exam(
        path=path,
        scorer=load(dtype),
        config=config,
        card=card if asked == "myrm" else None,
        reload=load,
        card_error=card_error,
        kind=asked,
    )
    count = sum(parameter.numel() for parameter in exam.network.parameters())
    finding = f"all {count:,} weights are in the folder, none is left over"
    return exam, Check("pass", finding, float(count), name="load", section=LOADED)
