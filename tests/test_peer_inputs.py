"""Inputs of diffusers' tests as peer runs change them: larger videos, positions of a picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from vidsparse import TokenGrid
from vidsparse.pipelines.families import flux, minimax_h3

PEER = Path(__file__).resolve().parent / "peer"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PEER))
    return importlib.import_module("accelerate_everything")


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PEER))
    return importlib.import_module("layouts")


def test_what_was_as_large_as_the_video_grows_with_it(plugin: ModuleType) -> None:
    small, face = Image.new("RGB", (32, 16), "red"), Image.new("RGB", (8, 8))

    def inputs() -> dict[str, Any]:
        return {
            **{"height": 16, "width": 32, "num_frames": 9, "face": face},
            **{"image": small, "video": [small, small], "mask": torch.ones(2, 1, 16, 32)},
            **{"clip": torch.rand(1, 3, 5, 16, 32), "latents": torch.rand(1, 4, 3, 2, 4)},
        }

    found = plugin.larger(inputs)()
    side = plugin.PIXELS
    assert (found["height"], found["width"], found["num_frames"]) == (side, side, 9)
    assert found["image"].size == (side, side) and found["image"].getpixel((0, 0)) == (255, 0, 0)
    assert [frame.size for frame in found["video"]] == [(side, side)] * 2
    assert torch.equal(found["mask"], torch.ones(2, 1, side, side))
    assert found["clip"].shape == (1, 3, 5, side, side)
    assert found["face"] is face and found["latents"].shape == (1, 4, 3, 2, 4)


@pytest.mark.parametrize(
    "shape, larger",
    [((9, 3, 16, 16), (9, 3, 64, 64)), ((9, 16, 16, 3), (9, 64, 64, 3)), ((3, 8, 8), (3, 64, 64))],
)
def test_expected_shapes_grow(
    plugin: ModuleType, shape: tuple[int, ...], larger: tuple[int, ...]
) -> None:
    assert plugin.enlarged(shape) == larger


def test_pipelines_that_an_adapter_does_not_name(plugin: ModuleType) -> None:
    names = {pipeline.__name__ for pipeline in plugin.pipelines(flux.ADAPTER)}
    assert set(flux.ADAPTER.pipelines) | {"VisualClozePipeline"} <= names
    assert not {"Flux2Pipeline", "FluxPriorReduxPipeline"} & names


class Flux:
    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"img_ids": torch.randn(16, 3)}


def test_flux_gets_an_image(layouts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux, "__module__", "tests.test_models_transformer_flux")
    monkeypatch.setattr(Flux, "get_dummy_inputs", Flux.get_dummy_inputs)
    layouts.straighten(Flux)
    assert flux.grid(None, Flux().get_dummy_inputs()) == TokenGrid(1, 4, 4)


NUM_TEXT_TOKENS, NUM_AUDIO_TOKENS, NUM_VIDEO_TOKENS = 4, 6, 8


class MiniMax:
    """As in diffusers' test: text, sound and video, one after the other."""

    def get_packed_layout(self, num_video_tokens: int = NUM_VIDEO_TOKENS) -> dict[str, Any]:
        rows = torch.arange(NUM_TEXT_TOKENS + NUM_AUDIO_TOKENS + num_video_tokens)
        text, sound, video = rows.split((NUM_TEXT_TOKENS, NUM_AUDIO_TOKENS, num_video_tokens))
        return {
            "position_ids": rows[:, None].repeat(1, 3).float(),
            "video_indices": video,
            "audio_indices": sound,
            "text_indices": text,
        }

    def get_dummy_inputs(
        self, num_video_tokens: int = NUM_VIDEO_TOKENS, batch_size: int = 2
    ) -> dict[str, Any]:
        latents = torch.randn(batch_size, num_video_tokens, 16)
        return {"hidden_states": latents, **self.get_packed_layout(num_video_tokens)}


def test_minimax_h3_gets_a_video(layouts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot tell the latent video"):
        minimax_h3.grid(None, MiniMax().get_dummy_inputs())
    for name in ("get_packed_layout", "get_dummy_inputs"):
        monkeypatch.setattr(MiniMax, name, getattr(MiniMax, name))
    monkeypatch.setitem(globals(), "NUM_VIDEO_TOKENS", NUM_VIDEO_TOKENS)
    layouts.straighten(MiniMax)
    found = MiniMax().get_dummy_inputs()
    assert found["hidden_states"].shape == (2, NUM_VIDEO_TOKENS, 16)
    video = TokenGrid(4, 4, 4, before=NUM_AUDIO_TOKENS)
    assert minimax_h3.grid(None, found) == video and video.video_tokens == NUM_VIDEO_TOKENS
