"""What pipelines are called with, by their signatures."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from vidsparse.generate.takes import NAMES, read_takes
from vidsparse.pipelines.families import adapters

PIPELINES = sorted({name for a in adapters() for name in a.pipelines if "Modular" not in name})

START = {
    # from the examples in the docstrings of the pipelines; what they cannot do without
    "ChronoEditPipeline": {"image"},
    "CogVideoXImageToVideoPipeline": {"image"},
    "CogVideoXVideoToVideoPipeline": {"video"},
    "FluxImg2ImgPipeline": {"image"},
    "HunyuanImageRefinerPipeline": {"image"},
    "HunyuanSkyreelsImageToVideoPipeline": {"image"},
    "HunyuanVideo15ImageToVideoPipeline": {"image"},
    "HunyuanVideoFramepackPipeline": {"image"},
    "HunyuanVideoImageToVideoPipeline": {"image"},
    "Kandinsky5I2IPipeline": {"image"},
    "Kandinsky5I2VPipeline": {"image"},
    "LTX2ImageToVideoPipeline": {"image"},
    "LTXImageToVideoPipeline": {"image"},
    "LucyEditPipeline": {"video"},
    "MotifVideoImage2VideoPipeline": {"image"},
    "QwenImageEditPipeline": {"image"},
    "QwenImageEditPlusPipeline": {"image"},
    "QwenImageImg2ImgPipeline": {"image"},
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": {"image"},
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"video"},
    "SkyReelsV2ImageToVideoPipeline": {"image"},
    "WanImageToVideoPipeline": {"image"},
    "WanVideoToVideoPipeline": {"video"},
}

IMAGES = (
    "Cosmos2TextToImage",
    "Flux",
    "HunyuanImage",
    "Kandinsky5I2I",
    "Kandinsky5T2I",
    "QwenImage",
)
"""How the pipelines are called that make images."""

REFUSED = {
    "CogVideoXFunControlPipeline": "a control video",
    "ConsisIDPipeline": "embeddings of a face",
    "Cosmos2_5_TransferPipeline": "control videos",
    "EasyAnimateInpaintPipeline": "a mask",
    "FluxControlImg2ImgPipeline": "a control image",
    "FluxControlInpaintPipeline": "a control image",
    "FluxControlNetImg2ImgPipeline": "a control image",
    "FluxControlNetInpaintPipeline": "a control image",
    "FluxControlNetPipeline": "a control image",
    "FluxControlPipeline": "a control image",
    "FluxFillPipeline": "a mask",
    "FluxInpaintPipeline": "a mask",
    "FluxKontextInpaintPipeline": "a mask",
    "Flux2KleinInpaintPipeline": "a mask",
    "HeliosPyramidPipeline": "its stages",
    "QwenImageControlNetInpaintPipeline": "a control image",
    "QwenImageControlNetPipeline": "a control image",
    "QwenImageEditInpaintPipeline": "a mask",
    "QwenImageInpaintPipeline": "a mask",
    "QwenImageLayeredPipeline": "layers",
    "WanAnimatePipeline": "a video of a face",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_taken_or_refused_for_a_reason(name: str) -> None:
    pipeline = getattr(diffusers, name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            read_takes(pipeline)
        return
    takes = read_takes(pipeline)
    assert takes.needs == START.get(name, set())
    parameters = inspect.signature(pipeline.__call__).parameters
    assert set(takes.names.values()) <= set(parameters)
    open_ = {
        p.name for p in parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    }
    given = {takes.names[n] for n in takes.needs} | {"prompt", "self"}
    assert open_ <= given, "a parameter that nobody gives"
    assert takes.still == name.startswith(IMAGES)


def test_tables_name_pipelines_that_there_are() -> None:
    assert set(START) | set(REFUSED) <= set(PIPELINES)


GUIDANCE = {
    "FluxPipeline": "guidance_scale",
    "HunyuanImagePipeline": None,  # its guider holds it
    "HunyuanSkyreelsImageToVideoPipeline": "true_cfg_scale",
    "HunyuanVideo15Pipeline": None,
    "HunyuanVideoPipeline": "guidance_scale",
    "QwenImagePipeline": "true_cfg_scale",
    "WanPipeline": "guidance_scale",
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_is_the_scale_that_guides_by_default(name: str) -> None:
    assert read_takes(getattr(diffusers, name)).names.get("guidance") == GUIDANCE[name]


def pipeline(call: Any) -> Any:
    return type("MadeUpPipeline", (), {"__call__": call})


def test_a_pipeline_that_nobody_has_seen() -> None:
    def call(self, image, prompt=None, height=4, width=None, num_inference_steps=7, strength=1):
        pass

    takes = read_takes(pipeline(call))
    assert takes.needs == {"image"} and takes.still
    assert takes.defaults == {"height": 4, "steps": 7}
    assert set(takes.names) <= set(NAMES)


def test_a_tensor_is_no_video() -> None:
    def call(self, height, width, num_inference_steps, video: torch.Tensor | None = None):
        pass

    takes = read_takes(pipeline(call))
    assert "video" not in takes.names
    assert "video" not in read_takes(diffusers.AnyFlowPipeline).names
    assert "video" in read_takes(diffusers.WanVACEPipeline).names


def test_only_families_that_say_how_big_may_decide_on_their_size() -> None:
    for adapter in adapters():
        for name in adapter.pipelines:
            if "Modular" in name or name in REFUSED:
                continue
            takes = read_takes(getattr(diffusers, name))
            assert takes.sized or adapter.own_size is not None, name
