"""A job's id and the name of its folder: the same exactly for the same job."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vidsparse.generate.job import prepare
from vidsparse.generate.request import Request
from vidsparse.jobs import identity
from vidsparse.jobs.layout import folder_name, slug

# Identity


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


BASE = {"prompt": "a cat", "height": 64, "width": 48, "frames": 5, "steps": 3}
OTHERS = {
    "prompt": {"prompt": "a cat."},
    "script": {"prompt": "猫"},
    "another script": {"prompt": "狗"},
    "emoji": {"prompt": "🐈"},
    "beyond the slug": {"prompt": "a cat" + " and a cat" * 30},
    "far beyond the slug": {"prompt": "a cat" + " and a cat" * 31},
    "case": {"prompt": "A CAT"},
    "negative": {"negative_prompt": "dogs"},
    "height": {"height": 48},
    "frames": {"frames": 9},
    "steps": {"steps": 4},
    "guidance": {"guidance": 3.0},
    "seed": {"seed": 1},
    "dtype": {"dtype": "bf16"},
    "preset": {"preset": "fast"},
    "set": {"overrides": ("schedule.density=0.3",)},
    "compare": {"compare_dense": True},
}


def test_every_other_job_has_another_id_and_folder(model):
    jobs = [prepare(Request(model=str(model), **BASE))]
    jobs += [prepare(Request(model=str(model), **BASE | other)) for other in OTHERS.values()]
    assert len({job.id for job in jobs}) == len(jobs)
    assert len({job.out.name.casefold() for job in jobs}) == len(jobs)


def test_the_same_job_has_the_same_id_wherever_it_runs(model, tmp_path):
    first = prepare(Request(model=str(model), **BASE, guidance=5))
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, moved)
    (moved / "README.md").write_text("about it")
    options = {**BASE, "guidance": 5.0, "out": tmp_path / "out"}
    assert prepare(Request(model=str(moved), **options)).id == first.id
    weights = next((moved / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert prepare(Request(model=str(moved), **options)).id != first.id


def test_fingerprint_of_large_files_sees_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 1000)
    generator = np.random.default_rng(0)
    tensors = {f"t{i}": generator.normal(size=size) for i, size in enumerate((3, 90_000, 700))}
    (tmp_path / "unet").mkdir()

    def found(changed):
        save_file(changed, tmp_path / "unet" / "model.safetensors")
        return identity.fingerprint(tmp_path, {"unet": ["diffusers", "X"]})

    same = found(tensors)
    assert same == found(tensors)
    for name, tensor in tensors.items():
        assert found({**tensors, name: tensor * 1.001}) != same, name
        for at in (0, tensor.size // 2):  # begin and middle are read, for every tensor
            moved = tensor.copy()
            moved[at] += 1.0
            assert found({**tensors, name: moved}) != same, (name, at)
    assert found({"renamed" if n == "t0" else n: t for n, t in tensors.items()}) != same
    (tmp_path / "unet" / ".cache").mkdir()
    (tmp_path / "unet" / ".cache" / "of-a-tool").write_text("hidden")
    assert found(tensors) == same
    for size in (100_000, 100_001):
        (tmp_path / "unet" / "model.safetensors").write_bytes(b"not weights" * size)
        other = identity.fingerprint(tmp_path, {"unet": ["diffusers", "X"]})
        assert other != same
        same = other


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--owner--a-model" / "snapshots" / commit
    assert identity.snapshot(folder) == f"owner/a-model@{commit}"
    assert identity.snapshot(tmp_path / "models--owner--a" / "snapshots" / "main") is None
    assert identity.snapshot(tmp_path) is None


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A large, red circle!", "a-large-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("Привет, мир", "привет-мир"),
        ("一只猫", "一只猫"),
        ("e\u0301te\u0301", "été"),
        ("x" * 80, "x" * 60),
        ("word " * 30, "-".join(["word"] * 12)),
        ("猫" * 40, "猫" * 20),
        ("...", ""),
        ("🐈", ""),
        ("\x1b[31m\u202e", "31m"),
        ("\u0301", ""),
    ],
)
def test_slug(text, name):
    assert slug(text) == name


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.text(max_size=40), st.integers(0, 2**63 - 1))
def test_every_folder_name_is_one_that_file_systems_take(prompt, preset, seed):
    name = folder_name(prompt, preset, (10_000, 10_000, 10_000), seed, "0123456789abcdef")
    assert len(os.fsencode(name)) <= 143 and name.endswith("-0123456789")
    assert unicodedata.normalize("NFC", name) == name
    assert name[0] not in ".-" and not set(name) & set('/\\:*?"<>| .\n\0')
    assert all(unicodedata.category(c)[0] in "LMN" or c == "-" for c in name)


def test_a_locale_with_few_letters_gets_the_letters_it_has(monkeypatch):
    def encode(name):
        return name.encode("ascii")

    monkeypatch.setattr(os, "fsencode", encode)
    assert (
        folder_name("一只 cat", "fast", (1, 2, 3), 4, "0" * 32)
        == "cat-fast-2x1x3-seed4-" + "0" * 10
    )
