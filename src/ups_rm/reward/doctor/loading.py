"""Loaded exactly? Every weight finite and as stored, the head found and trained, card, tokenizer and sizes agreeing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.errors import RMError
from ups_rm.reward.card import verify_answers, verify_folder
from ups_rm.reward.doctor.exam import TOLERANCE, Exam
from ups_rm.reward.doctor.report import Result
from ups_rm.reward.scorer import RewardScorer, logit_tolerance

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
FLOAT16_MAX = 65504.0
SPARE_ROWS = 0.05
FEW_WEIGHTS = 32
HEADS = ("myscore.", "score.", "classifier.")


def weights(exam: Exam) -> Result:
    """No NaN and no infinity, which is also what numbers over 65504 become when a folder is saved in float16."""
    import torch

    broken = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in exam.network.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    }
    stored = stored_dtypes(exam.path)
    details = {"stored": dict(stored), "computed": exam.dtype, "config": exam.config.get("dtype")}
    if broken:
        name = next(iter(broken))
        finding = (
            f"{sum(broken.values()):,} weights of {len(broken)} tensors are not finite, e.g. {broken[name]} in {name}"
        )
        way_out = "save the folder again from its source in bfloat16 or float32: float16 ends at 65504"
        return Result("fail", finding, float(sum(broken.values())), 0.0, way_out, details)
    formats = ", ".join(f"{count} tensors {name}" for name, count in stored.most_common())
    return Result(
        "pass", f"all finite; stored as {formats or 'pickle'}; computed in {exam.dtype}", 0.0, 0.0, "", details
    )


def stored_dtypes(folder: Path) -> Counter[str]:
    """How many tensors of the folder's safetensors files have which number format."""
    return Counter(
        DTYPE_NAMES.get(dtype, dtype) for _, dtype, _ in _stored_tensors(sorted(folder.glob("*.safetensors")))
    )


def _stored_tensors(files: list[Path]) -> Iterator[tuple[str, str, int]]:
    """(name, safetensors dtype, bytes) of every tensor, from the files' headers."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no dict
                piece = tensors.get_slice(name)
                size = math.prod(piece.get_shape()) * DTYPE_BYTES.get(piece.get_dtype(), 4)
                yield name, piece.get_dtype(), size


def index(exam: Exam) -> Result:
    """total_size of the index against the bytes of its tensors; transformers does not read it, other tools do."""
    file = exam.path / "model.safetensors.index.json"
    if not file.is_file():
        return Result("pass", "no index: one file of weights")
    told = json.loads(file.read_text(encoding="utf-8"))
    weight_map, listed = told.get("weight_map", {}), told.get("metadata", {}).get("total_size")
    found = {name: size for name, _, size in _stored_tensors([exam.path / s for s in sorted(set(weight_map.values()))])}
    size, problems = sum(found.values()), []
    if listed != size:
        problems.append(f"total_size says {listed}, the tensors have {size} bytes")
    if stray := sorted(set(found) ^ set(weight_map)):
        problems.append(f"{len(stray)} names are only in the index or only in a shard, e.g. {stray[0]}")
    if problems:
        way_out = f"harmless here; other tools may trip: {exam.again}"
        return Result("warn", "; ".join(problems), float(size), way_out=way_out)
    return Result("pass", f"{len(weight_map)} tensors, {size:,} bytes, as listed", float(size))


def tokenizer(exam: Exam) -> Result:
    """Is it the tokenizer that the RM was trained with? The card's golden ids must decode to the golden messages.

    Without a card only the BOS id can be compared, with config.json's.
    """
    own, bos = exam.scorer.tokenizer, exam.config.get("bos_token_id")
    way_out = "put the tokenizer files of the RM's own backbone into the folder"
    if exam.card is None:
        if isinstance(bos, int) and own.bos_token_id is not None and bos != own.bos_token_id:
            finding = f"its BOS is id {own.bos_token_id} ({own.bos_token}), config.json says {bos}"
            return Result("warn", finding, float(own.bos_token_id), float(bos), way_out)
        return Result("pass", f"{len(own):,} tokens; no card, so no golden ids to decode")
    wrong = []
    whole = [golden for golden in exam.card.golden if len(golden.input_ids) < exam.card.render.max_length]
    for i, golden in enumerate(whole):
        text = _bare(own.decode(golden.input_ids))
        for message in golden.messages:
            content = own(message["content"], add_special_tokens=False).input_ids
            if _bare(own.decode(content)) not in text:
                wrong.append(i)
    if len(set(wrong)) * 2 > len(whole):
        shown = own.decode(whole[wrong[0]].input_ids)[:60]
        finding = (
            f"tokenizer of another model: {len(set(wrong))} of {len(whole)} golden conversations decode to other text, "
            f"e.g. {shown!r}"
        )
        return Result("fail", finding, float(len(set(wrong))), 0.0, way_out)
    return Result("pass", f"{len(whole)} golden conversations decode to their own text", 0.0, 0.0)


def _bare(text: str) -> str:
    return "".join(text.split())


def vocabulary(exam: Exam) -> Result:
    """Rows of the embedding against the tokenizer's ids and config.json.

    Special tokens beyond it that no rendering has (an added pad, an unk that byte-level tokenizers never need) may be.
    """
    own, rows = exam.scorer.tokenizer, exam.embedding_rows
    told = exam.config.get("vocab_size")
    written = f"{own.chat_template} {exam.scorer.policy.end_token}"
    special = {i for i, token in own.added_tokens_decoder.items() if token.special} - {own.bos_token_id}
    over = {token: i for token, i in own.get_vocab().items() if i >= rows}
    beyond = {token: i for token, i in over.items() if i not in special or token in written}
    details = {
        "embedding": rows,
        "tokenizer": len(own),
        "config": told,
        "unused_beyond": sorted(set(over) - set(beyond)),
    }
    if beyond:
        token = min(beyond, key=lambda one: beyond[one])
        finding = (
            f"{len(beyond)} of the tokenizer's {len(own):,} tokens have no row in the embedding of {rows:,}, e.g. "
            f"{token!r} ({beyond[token]})"
        )
        way_out = "the tokenizer of the RM's own backbone, or grow the embedding and train the RM again"
        return Result("fail", finding, float(len(beyond)), 0.0, way_out, details)
    if isinstance(told, int) and told != rows:
        finding = f"config.json says vocab_size {told:,}, the embedding has {rows:,} rows"
        return Result("fail", finding, float(rows), float(told), f"correct config.json, or {exam.again}", details)
    spare = 1 - len(own) / rows
    if spare > SPARE_ROWS and rows - len(own) > 1024:
        finding = f"{spare:.0%} of the embedding's {rows:,} rows have no token ({len(own):,} tokens)"
        return Result("warn", finding, spare, SPARE_ROWS, "look whether it is this backbone's tokenizer", details)
    return Result(
        "pass", f"{len(own):,} tokens, {rows:,} rows of the embedding", float(len(own)), float(rows), "", details
    )


def card(exam: Exam) -> Result:
    """Every field of the card against the folder, golden token ids included."""
    if exam.kind != "myrm":
        way_out = "--output and --chat-template say what a card would; `ups-rm rm card` is for folders with an MLP head"
        return Result("skip", f"no card: its number is taken for {exam.output}", way_out=way_out)
    if exam.card_error:
        finding, _, way_out = exam.card_error.partition("\n  fix: ")
        return Result("fail", finding, way_out=way_out)
    if exam.card is None:
        return Result(
            "warn", "no rm_card.json: nothing says what its numbers mean", way_out=f"ups-rm rm card {exam.path}"
        )
    try:
        verify_folder(exam.card, exam.path, exam.scorer.tokenizer)
    except RMError as error:
        finding, _, way_out = str(error).partition("\n  fix: ")
        return Result("fail", finding, way_out=way_out)
    return Result("pass", f"config, template and {len(exam.card.golden)} golden renderings agree")


def head(exam: Exam) -> Result:
    """Do the head's weights still look as an initialiser leaves them? Then it was never trained, or lost on the way.

    Fresh means that every layer passes for a sample of one initialiser (Kolmogorov-Smirnov, 1%): torch's, uniform
    within 1/sqrt(inputs), or transformers', normal with the config's initializer_range and zero biases. Fails if
    besides the golden logits do not come out or the labels are not told apart; warns if nothing speaks to that. A
    single linear layer of transformers is moved so little by training that it may still pass: of it that is not said,
    nor that it is random where it tells the labels apart the wrong way round (`direction`).
    """
    layers = _head_layers(exam.network)
    if not layers:
        return Result("pass", "no head that is known (myscore.*, score, classifier): loaded without missing weights")
    widths = [int(weight.shape[0]) for weight, _ in layers[:-1]]
    count = sum(t.numel() for name, t in exam.network.state_dict().items() if name.startswith(HEADS))
    shape = f"{layers[0][0].shape[1]} -> {' -> '.join(map(str, [*widths, 1]))}, {count:,} weights"
    deviation = float(exam.config.get("initializer_range") or 0.02)
    fresh = all(_uniform(w, b) for w, b in layers) or all(_normal(w, b, deviation) for w, b in layers)
    if not fresh or count < FEW_WEIGHTS:
        return Result("pass", shape)
    evidence = _untrained(exam)
    way_out = "train the head, or merge the right one: `ups-rm rm train`, `ups-rm rm merge`"
    if exam.kind != "myrm":
        way_out = "train it, or find the checkpoint with the trained head: transformers draws a missing one at random"
    if evidence is None:
        return Result("pass", f"{shape}; they look freshly initialised, yet the labels are told apart")
    if evidence:
        return Result(
            "fail", f"random head: its weights look freshly initialised and {evidence} ({shape})", way_out=way_out
        )
    if exam.kind != "myrm":
        return Result("pass", f"{shape}; near an initialiser's, as a linear head often stays: --data tells more")
    return Result("warn", f"the weights look freshly initialised: random or hardly trained ({shape})", way_out=way_out)


def _head_layers(model: Any) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each linear layer of the head, input to output, in float64 on the CPU; no bias is one of 0."""
    found = {name: t.detach().cpu().double() for name, t in model.state_dict().items() if name.startswith(HEADS)}
    names = [name.removesuffix(".weight") for name, t in found.items() if name.endswith(".weight") and t.dim() == 2]
    layers = [found[f"{name}.weight"] for name in names]
    biases = [found.get(f"{name}.bias", w.new_zeros(len(w))) for name, w in zip(names, layers, strict=True)]
    return list(zip(layers, biases, strict=True))


def _uniform(weight: Tensor, bias: Tensor) -> bool:
    bound = weight.shape[1] ** -0.5
    inside = max(float(weight.abs().max()), float(bias.abs().max())) <= bound * 1.01
    return inside and _passes_for(weight, lambda x: ((x / bound + 1) / 2).clamp(0, 1))


def _normal(weight: Tensor, bias: Tensor, deviation: float) -> bool:
    import torch

    return not bool(bias.any()) and _passes_for(weight, lambda x: torch.special.ndtr(x / deviation))


def _passes_for(weight: Tensor, cdf: Any) -> bool:
    """Kolmogorov-Smirnov at 1%: the largest gap between empirical and given distribution, against 1.63 / sqrt(n)."""
    import torch

    expected = cdf(weight.flatten().sort().values)
    n = len(expected)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = max(float((expected - steps[:-1]).max()), float((steps[1:] - expected).max()))
    return gap < 1.63 * n**-0.5


def _untrained(exam: Exam) -> str | None:
    """Why a fresh-looking head is a random one; "" if nothing speaks for or against it, None if the labels do.

    Where the RM reads another text or token than it was trained on, labels speak of that and not of the head.
    """
    from ups_rm.reward.doctor.direction import figures

    if exam.card is not None:
        answers = [exam.scorer.batch_logits([golden.input_ids])[0] for golden in exam.card.golden]
        worst = exam.worst(answers, [golden.logit for golden in exam.card.golden])
        if not worst <= logit_tolerance(exam.card.dtype, exam.scorer.dtype):
            return f"the golden logits do not come out (off by {worst:.2g})"
    elsewhere = ("end token", "bos", "template", "last token")
    if exam.data is None or any(n in exam.known and exam.known[n].verdict == "warn" for n in elsewhere):
        return ""
    found = figures(exam.data, exam.data_logits)
    if exam.kind != "myrm" and found.auc_ci95[1] < 0.5:
        return None
    return f"the labels are not told apart (AUC {found.auc:.2f})" if found.auc_ci95[0] <= 0.5 else None


def golden_logits(exam: Exam) -> Result:
    """The card's golden token ids through the model as it is loaded now."""
    if exam.card is None:
        return Result("skip", "no card")
    answers = [exam.scorer.batch_answers([golden.input_ids])[0] for golden in exam.card.golden]
    limit = logit_tolerance(exam.card.dtype, exam.scorer.dtype)
    try:
        worst = verify_answers(exam.card, exam.path, answers, limit)
    except RMError as error:
        finding, _, way_out = str(error).partition("\n  fix: ")
        return Result("fail", finding, limit=limit, way_out=way_out)
    return Result("pass", f"{len(answers)} golden logits come out again", worst, limit)


def number_range(exam: Exam) -> Result:
    """The largest number that any module puts out, against what float16 can hold."""
    import torch

    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                value = float(tensor.detach().float().abs().max())
                largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(value) else value)

        return hook

    model = exam.network
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for row in exam.rows:
            exam.scorer.batch_logits([row])
    finally:
        for handle in handles:
            handle.remove()
    name = max(largest, key=lambda one: largest[one])
    first = next(one for one in largest if not largest[one] < FLOAT16_MAX) if largest[name] >= FLOAT16_MAX else name
    value, finding = largest[name], f"largest number inside: {largest[name]:.3g} at {name}"
    way_out = "bfloat16 or float32: reward_model.model.dtype, and save the folder in one of them"
    if value < FLOAT16_MAX:
        return Result("pass", f"{finding}; float16 holds 65504", value, FLOAT16_MAX)
    if exam.dtype == "float16":
        return Result("fail", f"float16 overflows, first at {first}", value, FLOAT16_MAX, way_out)
    if "float16" in stored_dtypes(exam.path):
        finding = f"{finding}: float16, the format it is stored in, overflows at {first}"
        return Result("warn", finding, value, FLOAT16_MAX, way_out)
    return Result("pass", f"{finding}; float16 would overflow, {exam.dtype} does not", value, FLOAT16_MAX)


def plain_transformers(exam: Exam) -> Result:
    """AutoModelForTokenClassification with the folder's own code must answer as ours does."""
    from ups_rm.reward.native import load_model

    if exam.kind != "myrm":
        return Result("skip", "plain transformers loads it already; what its own forward reads: last token")
    way_out = f"{exam.again}, which writes the two Python files anew"
    scorer = exam.scorer
    try:
        model = load_model(exam.path, dtype=scorer.dtype, device=scorer.device, trust_remote_code=True)
        other = RewardScorer(
            model,
            scorer.tokenizer,
            scorer.policy,
            device=scorer.device,
            dtype=scorer.dtype,
            native=False,
            heads=scorer.heads,
        )
        theirs, ours = ([one.batch_answers([row])[0] for row in exam.rows] for one in (other, scorer))
    except RMError as error:
        return Result("fail", str(error).partition("\n")[0], way_out=way_out)
    columns = zip(zip(*theirs, strict=True), zip(*ours, strict=True), strict=True)
    worst, limit = max(exam.worst(found, expected) for found, expected in columns), TOLERANCE[exam.dtype]
    if worst <= limit:
        return Result("pass", "the folder's own code answers as ours", worst, limit)
    return Result("fail", f"the folder's own code answers differently, by {worst:.3g}", worst, limit, way_out)
