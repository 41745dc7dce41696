"""The GPU suite starts where packages are missing, and names them."""

from pathlib import Path

import pytest
from gpu_suite import KERNELS, SUITE, bare

pytest.importorskip("triton", reason="triton is not installed")

import gpu_rows
import needs
from gpu_rows import Check


@pytest.mark.parametrize("script", ["gpu/suite.py", "aot/gate.py", "bench/cpu.py"])
def test_all_missing_packages_first(tmp_path: Path, script: str) -> None:
    """In one message with the cure, and nothing else, whatever the script imports first."""
    absent = ("torch", "triton", "omegaconf", "rich", "diffusers")
    done = bare(tmp_path, str(KERNELS / script), without=absent)
    assert done.returncode == 2, done.stderr
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    named = said.splitlines()[0].removeprefix("missing packages: ").split(", ")
    expected = {"torch", "omegaconf"} | ({"triton"} if script != "bench/cpu.py" else set())
    assert expected <= {*named}
    assert "pip install" in said and "'omegaconf>=" in said and "--needs" in said


def test_kernels_need_torch_and_triton_alone(tmp_path: Path) -> None:
    """The checks of the kernels list their units without any other package, from anywhere."""
    code = f"""
import sys
sys.path[:0] = [{str(KERNELS)!r}, {str(SUITE)!r}]
import needs
from gpu_start import machine_for, ways
from pathlib import Path
machine = machine_for(True, Path("."), 60.0, ways(), print)
import gpu_check
names = [u.name for u in (*gpu_check.first(machine), *gpu_check.units(machine))]
assert len(names) == len(set(names)) > 20
print("listed")
"""
    absent = ("omegaconf", "yaml", "rich", "diffusers", "transformers", "accelerate", "typer")
    done = bare(tmp_path, "-c", code, without=absent)
    assert done.stdout == "listed\n", done.stderr


@pytest.mark.slow
def test_a_part_without_its_packages_is_named_and_the_others_run(tmp_path: Path) -> None:
    command = [str(SUITE / "suite.py"), "--dry-run", "--out", str(tmp_path / "out")]
    parts = ["--only", "check", "model", "--units", "block means; "]
    done = bare(tmp_path, *command, *parts, without=("diffusers", "omegaconf", "rich"))
    assert done.returncode == 1, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == "missing packages: omegaconf, diffusers"
    assert second == "  model needs omegaconf, diffusers"
    assert "1/1  done" in done.stdout
    assert "Not run for lack of packages (1):\n- model: omegaconf, diffusers" in done.stdout
    (row,) = gpu_rows.load(tmp_path / "out" / "gpu_checks.csv", Check)
    assert row.verdict == "right" and row.gpu == "interpreter" and row.check == "block means"


@pytest.mark.slow
def test_a_gpu_needs_no_numpy(tmp_path: Path) -> None:
    """Its parts but the models are imported where nothing but torch and two wheels are."""
    parts = "gpu_check, gpu_check_select, gpu_model, gpu_sanitize, gpu_speed, gpu_tilings"
    code = f"""
import sys
sys.path[:0] = [{str(KERNELS)!r}, {str(SUITE)!r}]
import needs
import {parts}
from vidsparse.attention import attend
print("imported")
"""
    absent = ("numpy", "rich", "diffusers", "transformers", "accelerate", "typer", "matplotlib")
    done = bare(tmp_path, "-c", code, without=absent)
    assert done.stdout == "imported\n", done.stderr


def test_needs_names_every_wheel() -> None:
    """Of what torch does not bring, at any depth; not what it brings."""
    said = needs.report({"check": needs.KERNELS, "model": needs.MODELS})
    here, download = said.split("pip download")
    assert all(name in here for name in needs.MODELS)
    assert "--no-index" in download
    wheels = needs.beside_torch(needs.MODELS)
    names = {name.partition("==")[0] for name in wheels}
    assert {"omegaconf", "pyyaml", "pillow", "tokenizers", "tqdm", "huggingface-hub"} <= names
    assert not names & {"torch", "triton", "filelock", "fsspec", "typing-extensions"}
    assert all(f"'{name}'" in download for name in wheels)
    assert {n.partition("==")[0] for n in needs.beside_torch(needs.METHODS)} == {
        "omegaconf",
        "pyyaml",
    }
