"""A Python function as reward model: `module:callable`, messages in, one number per conversation out.

A recipe that names a function runs code of its author's choosing in this process, with this process' rights: read a
recipe that you did not write before you train with it. Only what Python can import by itself is taken; no path, no
expression, no source text.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from ups_rm.errors import RMError
from ups_rm.recipe_checks import CALLABLE
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Conversation, Score


def import_callable(spec: str) -> Callable[..., Any]:
    """The function that `module:name` names.

    Raises:
        RMError: another form, a module that can't be imported, a name that is not in it or can't be called.
    """
    if not CALLABLE.fullmatch(spec):
        raise RMError(f"{spec!r} is not `module:callable`, for example my_package.rewards:score")
    module_name, name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RMError(
            f"{spec}: module {module_name} can't be imported: {error}\n"
            "  fix: install it, or put its folder on the path: PYTHONPATH=FOLDER ups-rm ..."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RMError(
            f"{spec}: {module_name} has no function {name}\n  fix: name one that the module defines at its top level"
        )
    return function


def call_for_numbers(function: Callable[..., Any], spec: str, argument: Sequence[Any]) -> list[float]:
    """`function(argument)` as one finite float per element: a list, an array or a tensor is taken.

    Raises:
        RMError: another number of values, or values that are no numbers.
    """
    answer = function(list(argument))
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RMError(
            f"{spec} gave {type(answer).__name__} that is not one number per conversation: {error}"
        ) from error
    if len(numbers) != len(argument):
        raise RMError(f"{spec} gave {len(numbers)} numbers for {len(argument)} conversations")
    return numbers


class FunctionScorer:
    """Scores by a function of the user: `function(conversations) -> numbers`, conversations as lists of messages.

    Args:
        timeout_s: seconds that a call may take. One that takes longer can't be ended: its thread goes on beside the
            next calls until the function returns or the process ends.
    """

    def __init__(self, spec: str, *, timeout_s: float = 600.0) -> None:
        self.spec, self.timeout_s = spec, timeout_s
        self.function = import_callable(spec)

    def score(self, conversations: list[Conversation]) -> list[Score]:
        """One Score per conversation; the function counts no tokens, so `tokens` is 0.

        Raises:
            TimeoutError: no answer within `timeout_s`. RMError: see `call_for_numbers`; whatever the function raises.
        """
        if not conversations:
            return []
        numbers = self._within(lambda: call_for_numbers(self.function, self.spec, conversations))
        return [Score(logit=x, safe_score=safe_score(x), tokens=0, truncated=False) for x in numbers]

    def _within(self, call: Callable[[], list[float]]) -> list[float]:
        answer: Future[list[float]] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # raised again where it is waited for
                answer.set_exception(error)

        threading.Thread(target=run, name=f"reward {self.spec}", daemon=True).start()
        try:
            return answer.result(self.timeout_s)
        except FutureTimeout:
            if answer.done():  # the function's own TimeoutError
                raise
            raise TimeoutError(
                f"{self.spec} gave no answer within reward_model.timeout_s={self.timeout_s:g} s"
            ) from None
