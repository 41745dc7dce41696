"""Folders that are no models, or broken ones: one line that names file and cure, no traceback."""

import json
import math
import os
import shutil
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vidsparse.generate import memory
from vidsparse.generate import run as runs
from vidsparse.generate.job import prepare
from vidsparse.generate.model import Model, find_model
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.generate.request import Request
from vidsparse.generate.sizes import check_size

SMALL = {"height": 32, "width": 32, "frames": 5, "steps": 2, "prompt": "a monkey dances"}
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {
    "index": INDEX,
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on threads that other processes hold up take a hundred times longer."""
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved pipeline with random weights; its files are never written to."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


@pytest.fixture
def copy(whole, tmp_path):
    """A copy whose files are links: replace them, never write into them."""
    path = tmp_path / "copy"
    shutil.copytree(whole, path, copy_function=os.link)
    return path


def replace(path, content):
    """A file with other content, text or bytes; None: no file."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **changes):
    """Keys of a JSON file; ... takes a key away."""
    content = {**json.loads(path.read_text()), **changes}
    replace(path, json.dumps({k: v for k, v in content.items() if v is not ...}))


def tensors(path, change):
    """A safetensors file with changed tensors."""
    kept = load_file(path)
    change(kept)
    path.unlink()
    save_file(kept, path, metadata={"format": "pt"})


def load(folder, **options):
    """What `generate` does before it computes: check, load, try out."""
    job = prepare(Request(model=str(folder), **{**SMALL, **options}))
    return runs.load(job, runs.Listener())


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


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


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_component_that_is_missing(copy, part):
    shutil.rmtree(copy / part)
    assert part in refusal(copy)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_broken(copy, part):
    file = copy / WEIGHTS[part]
    whole = file.read_bytes()
    broken = {
        b"": "cut off",
        b"weights": "cut off",
        b"\xff" * 64: "cut off",
        whole[:-1]: "cut off",
        whole[: len(whole) // 2]: "cut off",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    }
    for content, said in broken.items():
        replace(file, content)
        text = refusal(copy)
        assert f"{part}/" in text and file.name in text and said in text


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt", ".gguf"])
def test_weights_that_can_run_code_are_refused_by_name(copy, part, ending):
    file = copy / WEIGHTS[part]
    other = file.with_suffix(ending)
    file.rename(other)
    text = refusal(copy)
    assert other.name in text and "convert to safetensors" in text


def test_pickled_weights_beside_safetensors_are_never_opened(copy):
    (copy / "text_encoder" / "pytorch_model.bin").write_bytes(b"no pickle")
    load(copy)


def test_variants_are_named(copy):
    file = copy / WEIGHTS["transformer"]
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "diffusion_pytorch_model.fp16.safetensors: load that variant" in refusal(copy)


@pytest.mark.parametrize("part", WEIGHTS)
def test_tensors_that_are_missing_or_of_another_shape(copy, part):
    """The libraries would make them up, or leave them on the meta device."""
    key = {"transformer": "proj_out.weight", "vae": "decoder.conv_out.weight"}.get(
        part, "encoder.final_layer_norm.weight"
    )
    file = copy / WEIGHTS[part]
    tensors(file, lambda kept: kept.pop(key))
    assert f"{part} cannot be loaded: 1 of its tensors" in refusal(copy)
    tensors(file, lambda kept: kept.update({key: torch.zeros(3)}))
    assert f"{part} cannot be loaded" in refusal(copy)


def test_weights_that_are_no_numbers(copy):
    def spoil(kept):
        kept["proj_out.bias"] = torch.full_like(kept["proj_out.bias"], math.nan)

    tensors(copy / WEIGHTS["transformer"], spoil)
    assert "no numbers" in refusal(copy)


def shard(copy):
    """The transformer in two shards; returns the index file."""
    file = copy / WEIGHTS["transformer"]
    kept = load_file(file)
    file.unlink()
    names = sorted(kept)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({key: kept[key] for key in keys}, file.with_name(name), {"format": "pt"})
    index = file.with_name(f"{file.name}.index.json")
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards(copy):
    index = shard(copy)
    load(copy)
    (index.parent / "b.safetensors").unlink()
    assert "names b.safetensors: missing" in refusal(copy)
    good = json.loads(index.read_text())["weight_map"]
    for broken in ({}, {"a": 3}, {**good, "x": "../../a.safetensors"}, [], None):
        edit(index, weight_map=broken)
        assert "weight_map" in refusal(copy)
    replace(index, "{")
    assert "not valid JSON" in refusal(copy)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_that_is_broken(copy, file):
    for content in ("{", "[]", "{}", b"\xff"):
        replace(copy / "tokenizer" / file, content)
        try:
            load(copy)
        except InputError as error:
            assert "\n" not in str(error)


JUNK = [None, 0, -1, 1, 3, 2**31, 2**63, 1e308, math.nan, math.inf, 0.5, True, False, "", "x"]
JUNK += [[], [0], [1, 2], [[]], {}, {"a": 1}, ["diffusers", "WanTransformer3DModel"]]


@st.composite
def places(draw):
    """A key of a config file of the tiny model, and a value that it never had."""
    pipe = PARTS["pipe"]
    part = draw(st.sampled_from(sorted(CONFIGS)))
    config = pipe.config if part == "index" else getattr(pipe, part).config
    keys = sorted(k for k in (config if isinstance(config, dict) else config.to_dict()))
    return part, draw(st.sampled_from(keys)), draw(st.sampled_from(JUNK))


PARTS = {"pipe": tiny.build("wan")[0]}


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


# What --model may name instead of a model.


def test_files_and_folders_that_are_no_pipeline(whole, copy, tmp_path):
    def said(path):
        with pytest.raises(InputError) as caught:
            find_model(str(path))
        return str(caught.value)

    for name in ("x.safetensors", "x.gguf", "x.ckpt", "x.sft"):
        (tmp_path / name).write_bytes(b"")
        assert "single files of weights are not supported" in said(tmp_path / name)
        assert "no such file" in said(tmp_path / f"no-{name}")
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert "this is a file" in said(tmp_path / "clip.mp4")
    assert f"--model {copy}" in said(copy / INDEX)
    assert "AutoencoderKLWan" in said(copy / "vae") and f"--model {copy}" in said(copy / "vae")
    assert "WanTransformer3DModel" in said(copy / "transformer")
    assert "UMT5EncoderModel" in said(copy / "text_encoder")
    assert "one part of a pipeline" in said(copy / "tokenizer")
    assert "UniPC" in said(copy / "scheduler") or "Euler" in said(copy / "scheduler")
    for name in ("adapter_config.json", "pytorch_lora_weights.safetensors"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        assert "this is a LoRA" in said(folder)
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2)}, folder / "any.safetensors")
    assert "this is a LoRA" in said(folder)
    original = tmp_path / "Wan2.1-T2V-1.3B"
    original.mkdir()
    (original / "config.json").write_text('{"model_type": "t2v"}')
    (original / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "-Diffusers" in said(original)
    assert f"--model {tmp_path / 'copy'}" in said(tmp_path)
    cached = tmp_path / "cache" / "models--a--b"
    shutil.copytree(whole, cached / "snapshots" / "abc", copy_function=os.link)
    assert "snapshots/abc" in said(cached)
    (tmp_path / "modular").mkdir()
    (tmp_path / "modular" / "modular_model_index.json").write_text("{}")
    assert "modular" in said(tmp_path / "modular")
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in said(tmp_path / "empty")
    assert "model_index.json" in said(Path(tiny.__file__).parent)


NAMES = {
    "": "leave --model out",
    "  \t": "leave --model out",
    "\0": "leave --model out",
    "x" * 300: "File name too long",
    "nowhere": "owner/name",
    "a/b/c": "owner/name",
    "a--b/c": "owner/name",
    "owner/": "owner/name",
    "owner/na me": "owner/name",
    "~nobody/x": "there is no such folder",
    "./no/where": "there is no such folder",
    "/no/where": "there is no such folder",
    "https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/tree/main": "--model Wan-AI/Wan2.1-T2",
    "nobody/nothing": "hub cannot be reached",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_no_model(name, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the hub's client, between tries
    with pytest.raises(InputError) as caught:
        find_model(name)
    assert NAMES[name] in str(caught.value) and "\n" not in str(caught.value)


def test_home_is_expanded(whole, monkeypatch):
    monkeypatch.setenv("HOME", str(whole.parent))
    assert find_model(f"~/{whole.name}/").source == str(whole)


def test_a_path_below_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Wan-AI").mkdir()
    said = []
    with pytest.raises(InputError, match="no such folder"):
        find_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", said.append)
    assert said == []


@pytest.mark.parametrize("error", [TypeError("a\nb"), OSError("c"), RuntimeError("")])
def test_whatever_the_hub_library_raises_is_one_line(monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(InputError) as caught:
        find_model("owner/name")
    assert type(error).__name__ in str(caught.value) and "\n" not in str(caught.value)


# Sizes in pixels and tokens; more in test_model_sizes.py.


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


# Memory, before anything is loaded.


def check(limit, monkeypatch, counts, size, tokens, dtype=torch.bfloat16):
    monkeypatch.setattr(memory, "capacity", lambda device: limit)
    files = {
        INDEX: {
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "transformer/config.json": {"num_attention_heads": 40, "attention_head_dim": 128},
    }
    memory.check_memory(Model("wan", "wan", files), counts, size, tokens, dtype, "cpu")


def test_weights_and_tokens_are_counted_in_their_dtype(monkeypatch):
    """Residual, query, key and value of 75,600 tokens in bf16, beside bf16 weights, an fp32 VAE."""
    counts, size = {"transformer": 14_000, "text_encoder": 5_000, "vae": 100}, (81, 720, 1280)
    need = 2 * 19_000 + 4 * 100 + 4 * 75_600 * 5_120 * 2
    check(need, monkeypatch, counts, size, 75_600)
    with pytest.raises(InputError, match=r"75,600 tokens do not fit.*3.1 GB.*fewer frames"):
        check(need - 1, monkeypatch, counts, size, 75_600)
    with pytest.raises(InputError, match="--dtype bf16"):
        check(need, monkeypatch, counts, size, 75_600, torch.float32)
    with pytest.raises(InputError, match=r"does not fit.*smaller model"):
        check(2 * 19_000 + 399, monkeypatch, counts, size, 75_600)


def test_the_decoded_video_is_counted(monkeypatch):
    size = (1001, 4096, 4096)  # far larger than its few tokens
    check(3 * math.prod(size) * 4, monkeypatch, {}, size, 10)
    with pytest.raises(InputError, match="do not fit"):
        check(3 * math.prod(size) * 4 - 1, monkeypatch, {}, size, 10)


def test_jobs_that_do_not_fit_are_refused_before_loading(whole, monkeypatch):
    request = Request(model=str(whole), **SMALL)
    prepare(request)
    monkeypatch.setattr(memory, "capacity", lambda device: 1000)
    with pytest.raises(InputError, match="does not fit"):
        prepare(request)


def test_memory_of_this_machine():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.capacity("cpu") <= pages + psutil.swap_memory().total


def test_limit_of_a_container_counts(tmp_path, monkeypatch):
    file = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (str(file), str(tmp_path / "nowhere")))
    free = memory.capacity("cpu")
    file.write_text("max\n")
    assert memory.capacity("cpu") == free
    file.write_text("123456\n")
    assert memory.capacity("cpu") == 123456


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_memory_that_runs_out_is_one_line(whole, tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(runs, "load", full)
    with pytest.raises(InputError, match="too little memory"):
        runs.generate(Request(model=str(whole), out=tmp_path / "out", **SMALL))


def test_memory_that_runs_out_in_a_library_is_no_fault_of_the_files(whole, monkeypatch):
    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr("diffusers.WanTransformer3DModel.from_pretrained", full)
    with pytest.raises(MemoryError):
        load(whole)
