"""Components and weights that are missing, broken or of another model: one line, no traceback."""

import json
import math
import shutil

import model_folders
import pytest
import tiny
import torch
from model_folders import WEIGHTS, edit, load, refusal, replace
from safetensors.torch import load_file, save_file

from vidsparse.generate.model_files import InputError

whole = pytest.fixture(scope="module")(model_folders.whole)
copy = pytest.fixture(model_folders.copy)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on threads that other processes hold up take a hundred times longer."""
    with tiny.one_thread():
        yield


def tensors(path, change):
    """A safetensors file with changed tensors."""
    kept = load_file(path)
    change(kept)
    path.unlink()
    save_file(kept, path, metadata={"format": "pt"})


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
