"""What --model may name instead of a model: one line that says what it is, and the cure."""

import os
import shutil
from pathlib import Path

import model_folders
import pytest
import tiny
import torch
from safetensors.torch import save_file

from vidsparse.generate.model import find_model
from vidsparse.generate.model_files import INDEX, InputError

whole = pytest.fixture(scope="module")(model_folders.whole)
copy = pytest.fixture(model_folders.copy)


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
