"""`generate` with models of every kind: what it gives the pipeline is what a person would.

The right frames come from the pipeline itself, loaded and called by hand with the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
import zoo
from PIL import Image

from vidsparse.generate import run as runs
from vidsparse.generate.request import Request
from vidsparse.quality.frames import read_clip, write_clip

SPARSE = (
    "schedule.min_tokens=0",
    "schedule.dense_layers=[]",
    "schedule.dense_steps=1",
    "kernel.block_q=16",
    "kernel.block_k=16",
    "kernel.crossover=1",
)
"""Few tokens, and a method that is sparse on them."""

WORDS = "a monkey dances"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on threads that other processes hold up take a hundred times longer."""
    with tiny.one_thread():
        yield


def clip_encoder() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=32,
    )
    return tiny.seeded(lambda: transformers.CLIPTextModel(config))


def flux(kind: str) -> Callable[[], Any]:
    """With text encoders, and latents that are 8 times smaller, as in the published models."""

    def build() -> Any:
        pipe, _ = zoo.pipelines()[kind]()
        vae = diffusers.AutoencoderKL(
            latent_channels=1,
            block_out_channels=(8,) * 4,
            norm_num_groups=2,
            shift_factor=0.0,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        width = pipe.transformer.config.joint_attention_dim
        config = transformers.T5Config(
            vocab_size=tiny.VOCABULARY, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        parts = {
            "text_encoder": clip_encoder(),
            "tokenizer": tiny.tokenizer(),
            "text_encoder_2": tiny.seeded(lambda: transformers.T5EncoderModel(config)),
            "tokenizer_2": tiny.tokenizer(),
            "vae": vae.eval(),
        }
        return type(pipe)(**{**pipe.components, **parts})

    return build


def saved(name: str) -> Callable[[], Any]:
    return lambda: zoo.pipelines()[name]()[0]


def mochi() -> Any:
    """With an autoencoder; its latents are 8 times smaller, and 6 times in time."""
    pipe, _ = zoo.pipelines()["mochi"]()
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5,
    )
    return type(pipe)(**{**pipe.components, "vae": vae.eval()})


def ltx(kind: str) -> Callable[[], Any]:
    """With an autoencoder whose latents are 32 times smaller, as the pipelines demand."""

    def build() -> Any:
        pipe, _ = zoo.pipelines()[kind]()
        few = (1,) * 5
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=few,
            decoder_layers_per_block=few,
        )
        return type(pipe)(**{**pipe.components, "vae": vae.eval()})

    return build


def between() -> Any:
    """From an image to another, with neither in cross-attention."""
    return diffusers.WanImageToVideoPipeline(
        transformer=tiny.transformer(in_channels=36),
        image_encoder=None,
        image_processor=None,
        **tiny.parts(),
    )


@dataclass(frozen=True)
class Made:
    """How one is made.

    build: the pipeline. asked: of the Request, but the files. gives: files to start from. call: of
    the pipeline by hand, what asked does not say by the same name. frames: that come out.
    """

    build: Callable[[], Any]
    asked: dict[str, Any] = field(default_factory=dict)
    gives: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)
    frames: int = 9


SIZE = {"height": 64, "width": 96, "frames": 9}
STILL = {"height": 128, "width": 192}

MADE = {
    "anyflow": Made(saved("anyflow"), SIZE),
    "chronoedit": Made(saved("chronoedit"), SIZE, ("image",), frames=5),  # whatever is asked for
    "cogvideox": Made(saved("cogvideox"), SIZE),
    "cogvideox 1.5": Made(saved("cogvideox 1.5"), SIZE),
    "cogvideox i2v": Made(saved("cogvideox i2v"), SIZE, ("image",)),
    "cogvideox v2v": Made(
        saved("cogvideox v2v"), {**SIZE, "steps": 5}, ("video",), {"num_frames": None}
    ),
    "flux": Made(flux("flux"), STILL, frames=1),
    "flux kontext": Made(
        flux("flux kontext"), STILL, ("image",), {"max_area": 128 * 192}, frames=1
    ),
    "helios": Made(saved("helios"), {**SIZE, "frames": 33}, frames=33),
    "ltx": Made(ltx("ltx"), {**SIZE, "height": 256, "width": 384}, call={"frame_rate": 25}),
    "ltx i2v": Made(ltx("ltx i2v"), {**SIZE, "height": 256, "width": 384}, ("image",)),
    "lucy_edit": Made(saved("lucy_edit"), SIZE, ("video",)),
    "mochi": Made(mochi, {**SIZE, "frames": 7}, frames=7),
    "skyreels_v2 image": Made(saved("skyreels_v2 image"), SIZE, ("image",)),
    "wan_i2v": Made(saved("wan_i2v"), SIZE, ("image",)),
    "wan_i2v 2.2": Made(between, SIZE, ("image", "last_image")),
    "wan_ti2v_image": Made(
        saved("wan_ti2v_image"), {**SIZE, "height": 128, "width": 192}, ("image",)
    ),
    "wan_v2v": Made(saved("wan_v2v"), {**SIZE, "steps": 5}, ("video",), {"num_frames": None}),
    "wan_vace": Made(saved("wan_vace"), SIZE, ("video",)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image and a video of 12 frames, of other proportions than what is made of them."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), np.uint8)
    for name, frame in (("image", noise[0]), ("last_image", noise[1])):
        Image.fromarray(frame).save(folder / f"{name}.png")
    write_clip(folder / "video.mkv", noise, 12.0)
    return {
        **{n: folder / f"{n}.png" for n in ("image", "last_image")},
        "video": folder / "video.mkv",
    }


def cut(frame: Any, height: int, width: int) -> Image.Image:
    """50 x 40 to 3 : 2 is 50 x 33.3 of the middle."""
    image = Image.fromarray(np.asarray(frame))
    rows = image.width * height / width
    top = (image.height - rows) / 2
    box = (0, top, image.width, top + rows)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def by_hand(folder: Path, made: Made, steps: int, files: dict[str, Path]) -> np.ndarray:
    """uint8 [frames, height, width, 3] from the pipeline itself."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    height, width = made.asked["height"], made.asked["width"]
    call = {"prompt": WORDS, "height": height, "width": width, "num_inference_steps": steps}
    if "frames" in made.asked:
        call["num_frames"] = made.asked["frames"]
    for name in made.gives:
        if name == "video":
            call[name] = [cut(f, height, width) for f in read_clip(files[name])[: made.frames]]
        else:
            call[name] = cut(Image.open(files[name]), height, width)
    call = {k: v for k, v in {**call, **made.call}.items() if v is not None}
    out = pipe(**call, generator=torch.Generator().manual_seed(5), output_type="np")[0][0]
    return np.rint(out.reshape(-1, height, width, 3).clip(0, 1) * 255).astype(np.uint8)


SLOW = (
    *("cogvideox v2v", "cogvideox i2v", "cogvideox 1.5"),
    *("flux kontext", "helios", "ltx i2v", "lucy_edit", "mochi", "skyreels_v2 image", "wan_v2v"),
)
"""Take long; another one of the kind is quick."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MADE]
)
def test_it_is_the_pipeline_with_the_same_inputs(name, tmp_path, files):
    made = MADE[name]
    model, out = tmp_path / "model", tmp_path / "out"
    made.build().save_pretrained(model)
    steps = made.asked.get("steps", 3)
    given = {n: files[n] for n in made.gives}
    asked = {"prompt": WORDS, "seed": 5, "steps": steps, **made.asked, **given}
    content = runs.generate(
        Request(str(model), overrides=SPARSE, out=out, compare_dense=True, **asked)
    )
    dense = read_clip(out / "dense.mkv")
    assert len(dense) == content["frames"] == made.frames
    assert np.array_equal(dense, by_hand(model, made, steps, files))
    assert content["sparse_calls"] > 0 and set(content["dense_reasons"]) == {"warmup-step"}
    assert set(content["inputs"]) == set(made.gives)
    still = made.frames == 1
    assert (out / "sparse.png").exists() == still and (out / "sparse.mp4").exists() != still
