"""The search for the running pipeline leaves nothing behind in the functions that it looks into."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import tiny
import torch

import vidsparse
from vidsparse.pipelines.runner import running_pipeline


class Decoded(Exception):
    """Instead of a video."""


def alive_while_decoding(pipe: Any, call: dict[str, Any]) -> list[int]:
    """Numbers of the forwards of which the output is still held when the VAE begins to decode."""
    made: list[weakref.ref[torch.Tensor]] = []
    found: list[int] = []

    def decode(*args: Any, **kwargs: Any) -> None:
        found.extend(n for n, output in enumerate(made) if output() is not None)
        raise Decoded

    handle = pipe.transformer.register_forward_hook(
        lambda module, args, output: made.append(weakref.ref(output[0]))
    )
    pipe.vae.decode = decode
    with pytest.raises(Decoded):
        tiny.run(pipe, call, output_type="pt")
    handle.remove()
    del pipe.vae.decode
    return found


def test_a_run_holds_what_a_stock_run_holds() -> None:
    pipe, call = tiny.build("wan")
    stock = alive_while_decoding(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert alive_while_decoding(pipe, call) == stock
    assert len(stock) < 3


def test_locals_that_someone_holds_stay() -> None:
    class Own:
        def __init__(self, pipe: Any) -> None:
            self.scheduler, self.transformer = pipe.scheduler, pipe.transformer

        def loop(self) -> None:
            number = 7
            held = locals()
            assert running_pipeline(self.transformer) is self
            assert held["number"] == number

    pipe, _ = tiny.build("wan")
    Own(pipe).loop()
    assert running_pipeline(pipe.transformer) is None
