"""Logits to scores: where the sign is turned, and how far the sigmoid bends. Pure functions of numbers; no torch.

A model's own number first becomes a logit of *unsafety* (`unsafety_logit`, by what the model's output means), and that
becomes the score that the policy is rewarded with (`score_of`, higher = safer). Nothing else in the package changes a
sign. What each transform does to groups: docs/guides/scores-and-signs.md.
"""

from __future__ import annotations

import math

from ups_rm.errors import RMError

OUTPUTS = ("unsafety", "safety", "reward")
"""What a model's number means: higher = less safe; higher = safer, 0 = undecided; higher = better, 0 has no meaning."""
TRANSFORMS = ("sigmoid", "logit", "logsigmoid", "tempered_sigmoid")


def unsafety_logit(value: float, output: str = "unsafety") -> float:
    """A model's number as a logit of unsafety: as it is for `unsafety`, negated for `safety` and `reward`.

    Raises:
        RMError: `output` is none of OUTPUTS.
    """
    if output not in OUTPUTS:
        raise RMError(f"output is {output!r}, expected one of {', '.join(OUTPUTS)}")
    return value if output == "unsafety" else -value


def safe_score(logit: float) -> float:
    """sigmoid(-logit), in (0, 1): the logit is the degree of unsafety, this is where it becomes a reward."""
    if logit >= 0:
        return math.exp(-logit) / (1 + math.exp(-logit))
    return 1 / (1 + math.exp(logit))


def score_of(logit: float, transform: str = "sigmoid", temperature: float = 1.0) -> float:
    """The score of an unsafety logit, higher = safer.

    sigmoid: sigmoid(-logit), in (0, 1). logit: -logit, unbounded. logsigmoid: log sigmoid(-logit), in (-inf, 0): flat
    for safe replies only. tempered_sigmoid: sigmoid(-logit / temperature), in (0, 1).

    Raises:
        RMError: `transform` is none of TRANSFORMS, or a temperature that is not above 0.
    """
    if not temperature > 0:
        raise RMError(f"temperature is {temperature}, expected a number above 0")
    if transform == "sigmoid":
        return safe_score(logit)
    if transform == "logit":
        return -logit
    if transform == "logsigmoid":
        return -max(logit, 0.0) - math.log1p(math.exp(-abs(logit)))
    if transform == "tempered_sigmoid":
        return safe_score(logit / temperature)
    raise RMError(f"transform is {transform!r}, expected one of {', '.join(TRANSFORMS)}")


def score_range(transform: str) -> tuple[float, float]:
    """The ends that `score_of` comes near to but does not reach (in floating point it may).

    Raises:
        RMError: `transform` is none of TRANSFORMS.
    """
    ranges = {
        "sigmoid": (0.0, 1.0),
        "logit": (-math.inf, math.inf),
        "logsigmoid": (-math.inf, 0.0),
        "tempered_sigmoid": (0.0, 1.0),
    }
    if transform not in ranges:
        raise RMError(f"transform is {transform!r}, expected one of {', '.join(TRANSFORMS)}")
    return ranges[transform]
