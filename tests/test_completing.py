"""What a request leaves open, for models that start from images and videos; what is refused."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
from PIL import Image

from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.quality.frames import write_clip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved pipelines with random weights, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan", "wan_i2v", "wan_v2v"):
        tiny.build(name, rope_max_seq_len=128)[0].save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tall image of 30 x 60, and a video of 12 frames of 64 x 32, at 8 a second."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), np.uint8)
    Image.fromarray(noise[0, :30].repeat(2, 0)[:, :30]).save(folder / "tall.png")
    write_clip(folder / "wide.mkv", noise, 8.0)
    return folder


def job(models, name, **asked) -> Job:
    settings = {"prompt": "a monkey", "steps": 4, "frames": 9, **asked}
    return prepare(Request(str(models / name), **settings))


def refusal(models, name, **asked) -> str:
    with pytest.raises(InputError) as caught:
        job(models, name, **asked)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_image_gives_the_video_its_proportions(models, files):
    """As many pixels as the pipeline's own size, to multiples of 16."""
    made = job(models, "wan_i2v", image=files / "tall.png")
    height, width, _ = made.size
    assert height % 16 == width % 16 == 0
    assert height / width == pytest.approx(2, rel=0.05)
    assert height * width == pytest.approx(480 * 832, rel=0.05)
    assert made.inputs[0].size == (height, width)
    assert not made.notes or "loses" not in " ".join(made.notes)


def test_a_side_that_is_asked_for_is_kept(models, files):
    assert job(models, "wan_i2v", image=files / "tall.png", height=64).size == (64, 32, 9)
    assert job(models, "wan_i2v", image=files / "tall.png", width=64).size == (128, 64, 9)
    made = job(models, "wan_i2v", image=files / "tall.png", height=64, width=64)
    assert made.size == (64, 64, 9)
    assert "tall.png, 30x60, loses 50% at its edges in 64x64" in " ".join(made.notes)


def test_a_video_gives_its_length_and_its_speed(models, files):
    made = job(models, "wan_v2v", video=files / "wide.mkv", frames=None, height=32)
    assert made.size == (32, 64, 9) and made.fps == 8  # 4 k + 1 of 12
    assert "the first 9 frames of wide.mkv are taken" in " ".join(made.notes)
    made = job(models, "wan_v2v", video=files / "wide.mkv", frames=5, height=32)
    assert made.size[2] == 5 == len(made.inputs[0].frames)


def test_another_pipeline_of_the_family_may_take_the_parts(models, files):
    made = job(
        models,
        "wan",
        pipeline="WanVideoToVideoPipeline",
        video=files / "wide.mkv",
        height=32,
    )
    assert made.takes.pipeline == "WanVideoToVideoPipeline"
    plain = job(models, "wan_v2v", video=files / "wide.mkv", height=32)
    assert made.id != plain.id


def test_the_id_tells_inputs_and_shifts_apart(models, files):
    asked = {"height": 64, "width": 64}
    one = job(models, "wan_i2v", image=files / "tall.png", **asked)
    again = job(models, "wan_i2v", image=str(files / "tall.png"), **asked)
    turned = files / "turned.png"
    Image.open(files / "tall.png").rotate(180).save(turned)
    assert one.id == again.id != job(models, "wan_i2v", image=turned, **asked).id
    assert one.id != job(models, "wan_i2v", image=files / "tall.png", flow_shift=2, **asked).id


REFUSED = {
    "no image": ("wan_i2v", {}, "starts from an image: give --image"),
    "no video": ("wan_v2v", {}, "starts from a video: give --video"),
    "image for text": (
        "wan",
        {"image": "tall.png"},
        "--image: a WanPipeline takes none, a WanImageToVideoPipeline does: add --pipeline "
        "WanImageToVideoPipeline",
    ),
    "video for text": ("wan", {"video": "wide.mkv"}, "add --pipeline WanVideoToVideoPipeline"),
    "video for image": ("wan_i2v", {"image": "tall.png", "video": "wide.mkv"}, "--video: "),
    "another family": (
        "wan",
        {"pipeline": "FluxPipeline"},
        "--pipeline FluxPipeline: expected one of WanPipeline, ",
    ),
    "too long": ("wan_v2v", {"video": "wide.mkv", "frames": 13}, "--frames 13: wide.mkv has 12"),
    "no step is done": ("wan_v2v", {"video": "wide.mkv", "steps": 1}, "--steps 1: "),
    "shift": ("wan", {"flow_shift": 0}, "--flow-shift 0: expected a number 0.01 .. 100"),
    "empty": ("wan_i2v", {"image": ""}, "--image '': expected text"),
    "bytes": ("wan_i2v", {"image": b"a.png"}, "--image b'a.png': expected text"),
    "gone": ("wan_i2v", {"image": "gone.png"}, "no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(models, files, case):
    name, asked, said = REFUSED[case]
    inputs = ("image", "last_image", "video")
    given = {
        k: files / v if k in inputs and isinstance(v, str) and v else v for k, v in asked.items()
    }
    assert said in refusal(models, name, **{"height": 32, "width": 64, **given})


def test_a_shift_reaches_the_scheduler(models):
    from vidsparse.generate.loading import schedule

    pipe = diffusers.DiffusionPipeline.from_pretrained(models / "wan")
    before = pipe.scheduler.config.shift
    schedule(pipe, job(models, "wan", height=32, width=32))
    assert pipe.scheduler.config.shift == before
    schedule(pipe, job(models, "wan", height=32, width=32, flow_shift=2.5))
    assert pipe.scheduler.config.shift == 2.5
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
