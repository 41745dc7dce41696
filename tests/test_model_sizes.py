"""Sizes of a video: what a stock pipeline refuses or rounds is refused, and tokens are counted."""

import json
import math
import re
from dataclasses import replace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.generate.model import Model, find_model
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.generate.sizes import check_size


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The small files of a Wan pipeline; tests replace what they are about."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    part = ["diffusers", "WanTransformer3DModel"]
    files = {
        "model_index.json": {
            "_class_name": "WanPipeline",
            "transformer": part,
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "vae/config.json": {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
        "transformer/config.json": {"patch_size": [1, 2, 2], "rope_max_seq_len": 1024},
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return find_model(str(path))


def shaped(model, spatial=8, temporal=4, patch=(2, 2), longest=1024):
    vae = {"scale_factor_spatial": spatial, "scale_factor_temporal": temporal}
    transformer = {"patch_size": [1, *patch], "rope_max_seq_len": longest}
    return with_configs(model, vae, transformer)


def with_configs(model, vae, transformer):
    configs = {"vae/config.json": vae, "transformer/config.json": transformer}
    return replace(model, files={**model.files, **configs})


def accepts(model, height=64, width=64, frames=5):
    try:
        return check_size(model, height, width, frames) > 0
    except InputError:
        return False


@pytest.mark.parametrize("spatial", [8, 16], ids=["8-fold autoencoder", "16-fold autoencoder"])
def test_a_size_is_accepted_if_the_stock_pipeline_gives_just_that(model, spatial):
    """Stock refuses what 16 does not divide, and rounds down to whole patches of the latents."""
    pipe, call = tiny.build("wan")
    pipe.vae_scale_factor_spatial = spatial
    pipe.set_progress_bar_config(disable=True)
    taken = []
    for size in (8, 16, 24, 32, 48, 80, 96):
        asked = {**call, "height": size, "width": 96, "num_frames": 5, "num_inference_steps": 1}
        try:
            latents = tiny.run(pipe, asked)
            stock = latents.shape[3] * spatial == size
        except (ValueError, RuntimeError):  # refused, or rounded to nothing
            stock = False
        for swapped in ({"height": size, "width": 96}, {"height": 96, "width": size}):
            assert accepts(shaped(model, spatial), **swapped) == stock, swapped
        taken += [size] * stock
    assert taken == ([16, 32, 48, 80, 96] if spatial == 8 else [32, 96])


SIDES = st.integers(-3, 40).map(lambda n: 8 * n) | st.integers(-40, 400)


@given(
    spatial=st.sampled_from([4, 8, 16, 32]),
    temporal=st.sampled_from([1, 4, 8]),
    patch=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    longest=st.integers(4, 24),
    size=st.tuples(SIDES, SIDES, st.integers(-3, 60)),
)
@settings(max_examples=400, deadline=None)
def test_sizes_by_their_definition(model, spatial, temporal, patch, longest, size):
    made = shaped(model, spatial, temporal, patch, longest)
    height, width, frames = size
    tokens = 1
    for side, piece in ((height, spatial * patch[0]), (width, spatial * patch[1])):
        whole = side > 0 and side % 16 == 0 and side % piece == 0
        tokens *= side // piece if whole and side // piece <= longest else 0
    latent = (frames - 1) // temporal + 1
    whole = frames > 0 and (frames - 1) % temporal == 0
    tokens *= latent if whole and latent <= longest else 0
    if tokens:
        assert check_size(made, *size) == tokens
    else:
        with pytest.raises(InputError):
            check_size(made, *size)


@given(height=st.integers(-40, 2000), frames=st.integers(-9, 400))
@settings(max_examples=200, deadline=None)
def test_a_refusal_names_the_next_sizes_that_are_accepted(model, height, frames):
    for name, value, least in (("height", height, 32), ("frames", frames, 1)):
        made = shaped(model, spatial=16)
        try:
            check_size(made, **{"height": 64, "width": 64, "frames": 5, name: value})
            continue
        except InputError as error:
            text = str(error)
        assert f"--{name} {value}:" in text and "\n" not in text
        near = [int(n) for n in re.search(r"near it: ([\d, ]+)$", text)[1].split(",")]
        step = 32 if name == "height" else 4
        around = range(max(least, value - step + 1), value + step)
        good = [n for n in around if accepts(made, **{name: n})]
        assert near == (good if value > 0 else [least])


def test_the_longest_side_is_told(model):
    made = shaped(model, spatial=16, longest=5)
    assert accepts(made, height=160, width=160, frames=17)
    for name, most in (("height", 160), ("width", 160), ("frames", 17)):
        over = most + (32 if name != "frames" else 4)
        with pytest.raises(InputError, match=f"--{name} {over}: .* {most} at most"):
            check_size(made, **{"height": 160, "width": 160, "frames": 17, name: over})
    odd = shaped(model, spatial=4, patch=(2, 2), longest=5)  # 40 pixels at most, 16 divides 32
    assert accepts(odd, 32, 32, 1)
    with pytest.raises(InputError, match="32 at most"):
        check_size(odd, 48, 32, 1)


def test_what_the_files_leave_open_is_as_in_wan(model):
    bare = with_configs(model, {}, {})
    for size in ((480, 832, 81), (16, 16384, 1), (16, 16, 4 * 1023 + 1)):
        assert check_size(bare, *size) == check_size(shaped(model), *size)
    assert check_size(bare, 480, 832, 81) == math.prod((480 // 16, 832 // 16, 80 // 4 + 1))
    assert not accepts(bare, width=16384 + 16) and not accepts(bare, frames=4 * 1024 + 1)


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)
)
def test_sizes_that_are_taken_are_whole_tokens(temporal, spatial, time_patch, patch, count):
    """Patches over several frames too, the last of which a pipeline fills up."""
    files = {
        INDEX: {
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "vae/config.json": {"scale_factor_spatial": spatial, "scale_factor_temporal": temporal},
        "transformer/config.json": {"patch_size": [time_patch, patch, patch]},
    }
    latents = count * time_patch
    frames = temporal * (latents - 1) + 1  # the first frame is a latent of its own
    side = math.lcm(16, spatial * patch) * count
    tokens = check_size(Model("any", "", files), side, side, frames)
    assert tokens == count * (side // (spatial * patch)) ** 2
    if temporal > 1:
        with pytest.raises(InputError, match="near it"):
            check_size(Model("any", "", files), side, side, frames + 1)
