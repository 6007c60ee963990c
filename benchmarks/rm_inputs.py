"""What the parts of rm_quality.py share: where features come from, and how a finding is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.layer_features import LayerFeatures, layer_features
from benchmarks.rm_heads import figures
from ups_rm.data.rows import Row, read_rows
from ups_rm.reward.feature_set import FeatureSet
from ups_rm.reward.trim import JUDGE_TEMPLATE

TEMPLATES = {"chat": None, "judge": JUDGE_TEMPLATE}


@dataclass
class Inputs:
    """Where features come from; the cache fills as parts ask for them."""

    pairs: str
    cache: Path
    backbone: str
    max_seconds: float
    layer: int
    seeds: int
    max_layer: int | None
    template: str = "chat"
    folds: tuple[int, ...] = (0,)

    def layers(
        self,
        source: str,
        texts: Sequence[Row] | None = None,
        *,
        template: str | None = None,
        keep_layer: int | None = None,
    ) -> LayerFeatures:
        """The layers' features of the pairs ("real"), of the packaged sample ("sample"), or of given rows.

        Args:
            template: another one than the command was given.
            keep_layer: see `layer_features`.

        Raises:
            SystemExit: `max_seconds` were not enough; the next call goes on.
        """
        named = {"real": self.pairs, "sample": "sample"}
        rows = (
            texts
            if texts is not None
            else list(read_rows(named[source], split="train" if source == "sample" else None))
        )
        found = layer_features(
            self.backbone,
            rows,
            self.cache / f"{source}-{template or self.template}",
            chat_template=TEMPLATES[template or self.template],
            max_seconds=self.max_seconds,
            max_layer=self.max_layer,
            keep_layer=keep_layer,
        )
        if found is None:
            raise SystemExit(f"{source}: not finished in {self.max_seconds:.0f} s; call again to go on")
        return found


Finding = dict[str, Any]


def shown(features: FeatureSet, logits: Tensor, baseline: Tensor | None = None) -> Finding:
    """Figures as they are printed and written."""

    def span(ci95: tuple[float, float]) -> str:
        return f"[{ci95[0]:+.3f}, {ci95[1]:+.3f}]" if min(ci95) < 0 else f"[{ci95[0]:.3f}, {ci95[1]:.3f}]"

    one = figures(features, logits, baseline)
    row: Finding = {
        "AUC": round(one.auc, 4),
        "AUC 95%": span(one.auc_ci95),
        "pairwise": round(one.pairwise, 4),
        "pairwise 95%": span(one.pairwise_ci95),
    }
    if one.auc_gain_ci95 and one.pairwise_gain_ci95:
        row |= {"AUC gain 95%": span(one.auc_gain_ci95), "pairwise gain 95%": span(one.pairwise_gain_ci95)}
    return row
