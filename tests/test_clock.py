"""Steps are timed and counted, whether or not a pipeline calls back at their ends."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
import zoo

from vidsparse.generate.clock import Listener, StepClock
from vidsparse.pipelines.families import hunyuan_video15


class Told(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ended = 0

    def step(self, done: int, density: float) -> None:
        self.steps.append(done)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize(
    ("name", "calls_back"),
    [("wan", True), ("hunyuan_video15", False), ("hunyuan_video15 image", False)],
)
def test_every_step_is_told_and_timed(name: str, calls_back: bool) -> None:
    pipe, call = zoo.pipelines()[name]()
    pipe.set_progress_bar_config(disable=True)
    told = Told()
    clock = StepClock(pipe, False, told)
    with tiny.one_thread(), clock.running() as arguments:
        assert bool(arguments) == calls_back
        generator = torch.Generator().manual_seed(0)
        timed = pipe(**{**call, "output_type": "latent", **arguments}, generator=generator)[0]
    assert told.steps == list(range(1, zoo.STEPS + 1)) and told.ended == 1
    assert len(clock.marks) == len(clock.cpu_marks) == zoo.STEPS + 1  # the first is the begin
    assert clock.marks == sorted(clock.marks) and clock.density == [1.0] * zoo.STEPS
    assert "progress_bar" not in vars(pipe)
    with tiny.one_thread():
        generator = torch.Generator().manual_seed(0)
        alone = pipe(**{**call, "output_type": "latent"}, generator=generator)[0]
    assert torch.equal(timed, alone)


@pytest.mark.parametrize("picture", [(40, 50), (50, 40), (16, 64)])
def test_a_size_of_its_own_is_the_one_that_the_pipeline_makes(
    picture: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The height and width of the latents that it prepares for such an image."""
    pipe, call = zoo.pipelines()["hunyuan_video15 image"]()
    made: dict[str, Any] = {}

    class Prepared(Exception):
        pass

    def prepare(*args: Any, **named: Any) -> None:
        made.update(named)
        raise Prepared

    pipe.prepare_latents = prepare
    with pytest.raises(Prepared), tiny.one_thread():
        pipe(**{**call, "image": tiny.still(*picture)}, generator=torch.Generator())
    monkeypatch.setattr(hunyuan_video15, "COMPRESSION", pipe.vae_scale_factor_spatial)
    size = hunyuan_video15.own_size(pipe.transformer.config, picture)
    assert (made["height"], made["width"]) == size


def test_the_constants_of_that_size_are_those_of_diffusers() -> None:
    pipe, _ = zoo.pipelines()["hunyuan_video15 image"]()
    ratio = inspect.signature(type(pipe.vae)).parameters["spatial_compression_ratio"]
    target = inspect.signature(type(pipe.transformer)).parameters["target_size"]
    assert ratio.default == hunyuan_video15.COMPRESSION
    assert target.default == hunyuan_video15.TARGET
