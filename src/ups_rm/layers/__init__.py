"""Decoder layers as this project computes them itself, for training, the reference and reward models alike."""
