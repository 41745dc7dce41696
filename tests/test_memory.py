"""Memory that a job needs, before anything is loaded, and memory that runs out."""

import math
import os

import model_folders
import psutil
import pytest
import torch
from model_folders import SMALL, load

from vidsparse.generate import memory
from vidsparse.generate import run as runs
from vidsparse.generate.job import prepare
from vidsparse.generate.model import Model
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.generate.request import Request

whole = pytest.fixture(scope="module")(model_folders.whole)


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
