"""A saved tiny model to break, and what `generate` says of it: for tests of its files.

`whole` and `copy` are the functions of fixtures; a file of tests makes its own of them.
"""

import json
import os
import shutil

import pytest
import tiny

from vidsparse.generate import run as runs
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.generate.request import Request

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


def whole(tmp_path_factory):
    """A saved pipeline with random weights; its files are never written to."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


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
