"""Capacity on paper: what a recipe takes on N GPUs of a stated kind, from architecture numbers alone.

Needs no weights and no GPU. `architecture` counts parameters and FLOPs, `memory` bytes per GPU, `speed` seconds per
step, `plan` puts a recipe through all three, `report` prints it. Formulas and their sources are in docs/planning.md.
"""
