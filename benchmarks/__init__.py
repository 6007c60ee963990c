"""Measurements against peers; `python -m benchmarks NAME` from the checkout's root."""
