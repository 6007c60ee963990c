"""Does transformers' own forward read the token that ours reads? For classifiers of plain transformers.

Its decoders look for the last token that is not the pad id, ours for the last attended one. Where the end token is also
the pad id the two differ by one token; then what others measured of this RM, and trained into it, is another number.
"""

from __future__ import annotations

from typing import Any

import torch

from ups_rm.reward.doctor.direction import Figures, figures
from ups_rm.reward.doctor.exam import Exam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.scorer import RewardScorer

PAD_OF_ITS_OWN = "a pad_token_id in config.json that no rendering has; ours does not need one"


def last_token(exam: Exam) -> Result:
    """The model's own forward, each conversation alone and in one batch padded with its pad id, against ours.

    Warns where its pad id is missing, has no row in the embedding or is read in a rendering; fails if with labelled
    data its own reading tells the labels apart surely better, or if it answers differently for another reason.
    """
    if exam.kind == "token":
        return Result("pass", "it has a logit for every token: the one at the last attended token is taken")
    if exam.is_encoder:
        return Result("pass", "it pools by itself: its own forward is asked")
    pad = exam.network.config.get_text_config().pad_token_id
    if pad is not None and pad < 0:
        pad = None
    theirs = RewardScorer(
        exam.network,
        exam.scorer.tokenizer,
        exam.scorer.policy,
        device=exam.scorer.device,
        dtype=exam.scorer.dtype,
        native=False,
        pad_id=pad if pad is not None and pad < exam.embedding_rows else 0,
    )
    # the scorer's head is float32 whatever the backbone is
    hook = exam.scorer.model.head.register_forward_pre_hook(lambda _module, states: (states[0].float(),))
    try:
        return _compared(exam, theirs, pad)
    finally:
        hook.remove()


def _compared(exam: Exam, theirs: RewardScorer, pad: int | None) -> Result:
    own = exam.scorer.tokenizer
    alone = exam.worst([theirs.batch_logits([row])[0] for row in exam.rows])
    details: dict[str, Any] = {"pad_token_id": pad, "alone": alone}
    token = None if pad is None else own.convert_ids_to_tokens(pad)
    if alone > exam.tolerance and any(pad in row for row in exam.rows):
        finding = (
            f"pad == eos bug: the pad id {pad} ({token}) is a token of the conversation, and transformers takes the "
            f"last one that is not pad: it reads another token than ours, logits differ by {alone:.3g}"
        )
        return _told_by_labels(exam, theirs, finding, alone, details)
    if alone > exam.tolerance:
        way_out = "kind=function with a function of yours that asks its own forward"
        finding = f"its own forward answers differently, by {alone:.3g}: more than a linear head on the last token"
        return Result("fail", finding, alone, exam.tolerance, way_out, details)
    if pad is None:
        spare = "has none either" if own.pad_token_id is None else f"has {own.pad_token} (id {own.pad_token_id})"
        if own.pad_token_id is not None and any(own.pad_token_id in row for row in exam.rows):
            spare += ", which conversations have too: as pad id it would hide their end (the pad == eos bug)"
        finding = f"config.json has no pad id, the tokenizer {spare}; transformers' own forward refuses batches"
        return Result("warn", finding, alone, exam.tolerance, f"before it is used elsewhere: {PAD_OF_ITS_OWN}", details)
    if pad >= exam.embedding_rows:
        finding = f"the pad id {pad} ({token}) has no row in the embedding of {exam.embedding_rows:,}: others can't pad"
        return Result("warn", finding, float(pad), float(exam.embedding_rows), PAD_OF_ITS_OWN, details)
    batch = exam.worst(theirs.batch_logits(exam.rows))
    if batch > exam.tolerance:
        way_out = "kind=function with a function of yours that asks it one by one, or code that reads by the mask"
        finding = f"its own forward gives other logits in a padded batch, by {batch:.3g}"
        return Result("warn", finding, batch, exam.tolerance, way_out, details)
    finding = f"transformers' own forward, padded with {token}, gives the same logits"
    return Result("pass", finding, max(alone, batch), exam.tolerance, "", details)


def _told_by_labels(
    exam: Exam, theirs: RewardScorer, finding: str, difference: float, details: dict[str, Any]
) -> Result:
    """Which of the two readings the RM was trained for: nothing but labels can tell."""
    if exam.data is None:
        way_out = f"--data PAIRS tells which of the two it was trained for; then {PAD_OF_ITS_OWN}"
        return Result("warn", finding, difference, exam.tolerance, way_out, details)
    numbers = torch.tensor([score.logit for score in theirs.score(exam.data.conversations)], dtype=torch.float64)
    ours, others = figures(exam.data, exam.data_logits), figures(exam.data, exam.unsafety(numbers))
    details |= {"auc": ours.auc, "auc_of_its_own_forward": others.auc}
    finding += f"; AUC {ours.auc:.3f}, by its own reading {others.auc:.3f}"
    if _surely_better(others, ours):
        way_out = "kind=function with a function of yours that asks its own forward: it was trained to be read there"
        return Result("fail", finding, difference, exam.tolerance, way_out, details)
    return Result("warn", finding, difference, exam.tolerance, f"for others: {PAD_OF_ITS_OWN}", details)


def _surely_better(one: Figures, other: Figures) -> bool:
    return one.auc_ci95[0] > max(other.auc, 0.5) and one.auc > other.auc_ci95[1]
