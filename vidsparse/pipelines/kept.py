"""Kept: answers that cost a wait for the device, for as long as the tensors asked about live."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

Answer = TypeVar("Answer")

SIZE = 8
"""Prompts, each with its branches, that are worth remembering."""


class Kept(Generic[Answer]):
    """The last answers about values of tensors. A tensor that was written to is a new question.

    Threads may ask at once.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answers: OrderedDict[Any, tuple[list[Any], Answer]] = OrderedDict()

    def get(self, tensors: tuple[Tensor | None, ...], ask: Callable[[], Answer]) -> Answer:
        """The answer for these tensors; `ask` finds it if it is not known."""
        with self.lock:
            key = tuple((id(tensor), _version(tensor)) for tensor in tensors)
            known = self.answers.get(key)
            if known is not None and all(
                reference is None or reference() is tensor
                for reference, tensor in zip(known[0], tensors, strict=True)
            ):
                self.answers.move_to_end(key)
                return known[1]
            answer = ask()
            self.answers[key] = ([t if t is None else weakref.ref(t) for t in tensors], answer)
            self.answers.move_to_end(key)
            if len(self.answers) > SIZE:
                self.answers.popitem(last=False)
            return answer


def _version(tensor: Tensor | None) -> int:
    """How often it was written to; inference tensors do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
