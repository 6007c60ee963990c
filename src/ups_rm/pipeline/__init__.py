"""The whole way, as `ups-rm run` goes it (main.py), and the stages it is made of."""

from ups_rm.pipeline.context import Interrupted, Stopped
from ups_rm.pipeline.main import run

__all__ = ["Interrupted", "Stopped", "run"]
