"""The reward model: its folder, its card, how conversations become tokens and tokens become a safe score.

Never imports an engine: the local loop, verl, the server and the evaluation all score through `scorer.RewardScorer`.
"""
