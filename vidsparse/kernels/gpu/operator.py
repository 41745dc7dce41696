"""Launchers as operators of torch: graphs, fakes and profiles see one node for each.

As `torch.library.custom_op`, but without what that does in Python at every call for autograd and
for versions of tensors: 4 microseconds a call where it takes 30, and 120 for one that writes to its
arguments. Nothing here has a gradient (`vidsparse.kernels.call_check` refuses to be asked for one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.library import Library

LIBRARY = Library("vidsparse", "FRAGMENT")


class Operator:
    """A launcher as `torch.ops.vidsparse.<name>`.

    launcher: what it runs, with types in its signature. mutates: names of the arguments that it
    writes to; one that writes returns None, another one new tensors, never a view of an argument.
    """

    def __init__(self, name: str, launcher: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        self.name = name
        self.launcher = launcher
        self.__doc__ = launcher.__doc__
        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # As custom_op does it: the public `torch.compiler.disable` imports torch's compiler now.
        LIBRARY.impl(name, _disable_dynamo(launcher), "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.vidsparse, name).default
        if mutates:
            self.register_fake(lambda *_: None)

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """fake: what it returns, as to shapes, strides and dtypes."""
        torch.library.register_fake(f"vidsparse::{self.name}", fake, lib=LIBRARY)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function below."""
    return lambda launcher: Operator(name, launcher, mutates)
