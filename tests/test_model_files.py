"""Index and configs of a model that are missing, broken or do not fit: one line, no traceback."""

import math
import os
import shutil
from functools import cache

import model_folders
import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model_folders import CONFIGS, SMALL, edit, load, refusal, replace

from vidsparse.generate import run as runs
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.generate.request import Request

whole = pytest.fixture(scope="module")(model_folders.whole)
copy = pytest.fixture(model_folders.copy)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on threads that other processes hold up take a hundred times longer."""
    with tiny.one_thread():
        yield


def test_the_whole_model_is_taken(whole, copy):
    assert type(load(whole)).__name__ == type(load(copy)).__name__ == "WanPipeline"


# What is done to a file of the model -> what the message says.
INDEXES = {
    "empty": ("", "not valid JSON"),
    "no JSON": ("{", "not valid JSON"),
    "bytes": (b"\xff\xfe\x00", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "list": ("[]", "no JSON object"),
    "number": ("3", "no JSON object"),
    "no keys": ("{}", "no JSON object"),
    "no class": ('{"a": 1}', "_class_name"),
    "class is a list": ('{"_class_name": ["x", "WanPipeline"]}', "_class_name"),
    "class is null": ('{"_class_name": null}', "_class_name"),
    "class is unknown": ('{"_class_name": "MyPipeline"}', "`vidsparse models` lists"),
    "class is a function": ('{"_class_name": "logging"}', "`vidsparse models` lists"),
    "class alone": ('{"_class_name": "WanPipeline"}', "`vidsparse models` lists"),
    "another family": (
        '{"_class_name": "ConsisIDPipeline", '
        '"transformer": ["diffusers", "ConsisIDTransformer3DModel"]}',
        "lacks scheduler, text_encoder",
    ),
    "missing": (None, "save_pretrained"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_broken_index(copy, case):
    content, said = INDEXES[case]
    replace(copy / INDEX, content)
    assert said in refusal(copy)


ENTRIES = {
    "no vae": ({"vae": ...}, "lacks vae"),
    "null vae": ({"vae": [None, None]}, "lacks vae"),
    "no text encoder": ({"text_encoder": ...}, "lacks text_encoder"),
    "entry of one": ({"vae": ["diffusers"]}, "expected a library and a class"),
    "entry of three": ({"vae": ["diffusers", "AutoencoderKLWan", 1]}, "a library and a class"),
    "half an entry": ({"vae": ["diffusers", None]}, "expected a library and a class"),
    "code of its own": ({"vae": ["my_code", "MyVAE"]}, "never code that comes with a model"),
    "any module": ({"vae": ["os", "system"]}, "never code that comes with a model"),
    "unknown class": ({"vae": ["diffusers", "MyVAE"]}, "diffusers.MyVAE"),
    "another class": ({"vae": ["diffusers", "AutoencoderKL"]}, "vae"),
    "folder that is not there": ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "2"),
    "boundary": ({"boundary_ratio": "x"}, "boundary_ratio: 'x'"),
    "boundary too large": ({"boundary_ratio": 7}, "expected null or 0 .. 1"),
    "boundary of one": ({"boundary_ratio": 0.9}, "null with one"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_index_that_does_not_fit(copy, case):
    changes, said = ENTRIES[case]
    edit(copy / INDEX, **changes)
    assert said in refusal(copy)


VALUES = {
    "spatial 0": ("vae", {"scale_factor_spatial": 0}, "scale_factor_spatial: 0"),
    "spatial text": ("vae", {"scale_factor_spatial": "8"}, "scale_factor_spatial: '8'"),
    "spatial list": ("vae", {"scale_factor_spatial": [8]}, "whole number"),
    "spatial null": ("vae", {"scale_factor_spatial": None}, "whole number"),
    "spatial yes": ("vae", {"scale_factor_spatial": True}, "whole number"),
    "spatial huge": ("vae", {"scale_factor_spatial": 2**63}, "whole number"),
    "spatial of another": ("vae", {"scale_factor_spatial": 4}, "comes out as (5, 32, 32, 3)"),
    "temporal -4": ("vae", {"scale_factor_temporal": -4}, "scale_factor_temporal: -4"),
    "temporal of another": ("vae", {"scale_factor_temporal": 2}, "scale factors"),
    "z_dim": ("vae", {"z_dim": 8}, "vae cannot be loaded"),
    "means": ("vae", {"latents_mean": [0.0]}, "do not go together"),
    "patch of two": ("transformer", {"patch_size": [1, 2]}, "patch_size: [1, 2]"),
    "patch of zeros": ("transformer", {"patch_size": [0, 0, 0]}, "patch_size: [0, 0, 0]"),
    "patch text": ("transformer", {"patch_size": "122"}, "three whole numbers"),
    "patch of texts": ("transformer", {"patch_size": ["1", "2", "2"]}, "three whole numbers"),
    "patch null": ("transformer", {"patch_size": None}, "three whole numbers"),
    "patch of another": ("transformer", {"patch_size": [1, 4, 4]}, "transformer cannot be loaded"),
    "layers": ("transformer", {"num_layers": 3}, "tensors are missing"),
    "a billion layers": ("transformer", {"num_layers": 10**9}, "num_layers: 1000000000"),
    "layers text": ("transformer", {"num_layers": "2"}, "cannot be loaded"),
    "positions": ("transformer", {"rope_max_seq_len": 2**40}, "rope_max_seq_len"),
    "head": ("transformer", {"attention_head_dim": 10**9}, "attention_head_dim"),
    "width": ("transformer", {"text_dim": 32}, "transformer cannot be loaded"),
    "eps": ("transformer", {"eps": math.nan}, "no numbers"),
    "text width": ("text_encoder", {"d_model": 8}, "text_encoder cannot be loaded"),
    "text layers": ("text_encoder", {"num_layers": 10**9}, "num_layers"),
    "steps": ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps: 0"),
    "steps text": ("scheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps: '1000'"),
    "steps huge": ("scheduler", {"num_train_timesteps": 2**62}, "num_train_timesteps"),
}


@pytest.mark.parametrize("case", VALUES)
def test_config_values_that_do_not_fit(copy, case):
    part, changes, said = VALUES[case]
    edit(copy / CONFIGS[part], **changes)
    assert said in refusal(copy)


def test_layers_that_the_config_does_not_name_are_said(copy):
    edit(copy / CONFIGS["transformer"], num_layers=1)
    said = []
    job = prepare(Request(model=str(copy), **SMALL))
    listener = runs.Listener()
    listener.say = said.append
    runs.load(job, listener)
    assert any("tensors of transformer have no place" in text for text in said)


@pytest.mark.parametrize("part", [name for name in CONFIGS if name != "index"])
def test_config_that_is_missing_or_broken(copy, part):
    file = copy / CONFIGS[part]
    for content, said in ((None, "missing"), ("{", "not valid JSON"), ("[]", "no JSON object")):
        replace(file, content)
        text = refusal(copy)
        assert CONFIGS[part] in text and said in text


JUNK = [None, 0, -1, 1, 3, 2**31, 2**63, 1e308, math.nan, math.inf, 0.5, True, False, "", "x"]
JUNK += [[], [0], [1, 2], [[]], {}, {"a": 1}, ["diffusers", "WanTransformer3DModel"]]


@st.composite
def places(draw):
    """A key of a config file of the tiny model, and a value that it never had."""
    pipe = built()
    part = draw(st.sampled_from(sorted(CONFIGS)))
    config = pipe.config if part == "index" else getattr(pipe, part).config
    keys = sorted(k for k in (config if isinstance(config, dict) else config.to_dict()))
    return part, draw(st.sampled_from(keys)), draw(st.sampled_from(JUNK))


@cache
def built():
    return tiny.build("wan")[0]


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(("scheduler", "solver_order", 2**31))
@example(("vae", "num_res_blocks", 2**31))
@example(("vae", "dim_mult", [2**31]))
@given(places())
def test_any_value_anywhere_is_an_input_error_or_works(whole, tmp_path_factory, place):
    part, key, value = place
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(whole, folder, copy_function=os.link)
    edit(folder / CONFIGS[part], **{key: value})
    try:
        load(folder)
    except InputError as error:
        assert ("\n" not in str(error) and str(folder) in str(error)) or "--" in str(error)
    finally:
        shutil.rmtree(folder)
