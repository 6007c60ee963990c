"""What evaluation measures on the policies themselves: KL and perplexity, reply by reply, against a slow oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_training import causal_lm, policy_of, slow_logprobs, tiny_recipe
from ups_rm.data.prompts import encode_prompts
from ups_rm.local.evaluate import _logprob_sums
from ups_rm.local.rollout import RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.types import Message

PROMPTS = [[Message(role="user", content=text)] for text in ("How do I bake bread", "the moon", "at home")]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_kl_and_perplexity_of_every_reply(temperature: float, tmp_path: Path, policy_folder: Path) -> None:
    """KL at the sampling temperature (1 where replies are greedy), perplexity at temperature 1 whatever it is."""
    recipe = tiny_recipe(tmp_path, policy_folder, f"evaluation.temperature={temperature}", prompts=False)
    vocabulary = len(policy_of(causal_lm()).tokenizer)
    base, trained = (policy_of(causal_lm(seed=seed, vocab_size=vocabulary), trainable=False) for seed in (1, 2))
    sampling = Sampling(temperature=temperature, seed=3)
    before, after = (
        RolloutEngine(policy).generate(PROMPTS, n=2, max_new_tokens=6, sampling=sampling) for policy in (base, trained)
    )
    kl, nll_before, nll_after = _logprob_sums(trained, base, [before], [after], recipe)
    ids = encode_prompts(base.tokenizer, PROMPTS)
    at = temperature or 1.0

    def logprobs(policy, rollout, row: int, temperature: float):
        mask = rollout.sequences.response_mask[row].bool()
        return slow_logprobs(
            policy.model, ids[row // 2], rollout.sequences.responses[row][mask].tolist(), temperature
        ).sum()

    for row in range(6):
        expected = logprobs(trained, after, row, at) - logprobs(base, after, row, at)
        assert kl[row] == pytest.approx(float(expected), abs=1e-3)
        assert nll_before[row] == pytest.approx(-float(logprobs(base, before, row, 1.0)), abs=1e-3)
        assert nll_after[row] == pytest.approx(-float(logprobs(base, after, row, 1.0)), abs=1e-3)
    assert _logprob_sums(trained, base, [], [after], recipe)[1:] == ([], [])
    assert set(_logprob_sums(base, base, [], [before], recipe)[0]) == {0.0}
