"""What `vidsparse doctor` calls missing, on machines that differ in one fact."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidsparse import SparseConfig, TokenGrid, doctor, registry, shipped
from vidsparse.decision import decide
from vidsparse.kernels.cpu import machine as cpu_machine
from vidsparse.kernels.gpu import support

FLAGS = "fpu sse2 avx2 avx512f avx512_bf16 amx_bf16"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Facts of a machine: flags of its CPU, GPUs that torch sees, a GPU driver, or others."""
    cpu = registry.executor("cpu")
    info = cpu.figures()

    def auto(device):
        config = SparseConfig.load("tiles", ["schedule.name=constant", "schedule.min_tokens=0"])
        choice = decide(config, GRID, device=torch.device(device)).choice
        cell = {"device": device, "executor": choice.executor, "passed": dict(choice.passed)}
        return [cell | {"dtype": "", "route": "", "head_dim": 64, "tokens": 9, "density": 1}]

    def facts(flags=FLAGS, gpus=0, driver=False, refusal=None):
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        (root / "proc/driver").mkdir(parents=True)
        lines = ["processor : 0", "model name\t: A CPU: fast", f"flags\t\t: {flags}", "", "x : y"]
        (root / "proc/cpuinfo").write_text("\n".join([*lines, "model name : second", "flags : no"]))
        if driver:
            (root / "proc/driver/nvidia").mkdir()
        monkeypatch.setattr(cpu_machine, "INFO", root / "proc/cpuinfo")
        monkeypatch.setattr(doctor, "Path", lambda name: root / name.removeprefix("/"))
        monkeypatch.setattr(cpu, "figures", lambda: info)
        monkeypatch.setattr(doctor, "_auto", auto)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        card = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        monkeypatch.setattr(support, "refusal", lambda device: refusal)
        monkeypatch.setattr(doctor, "_backends", lambda device: {"math": True, "flash": False})
        return doctor.examine()

    return facts


def missing(facts):
    assert all(set(item) == {"what", "costs", "cure"} for item in facts["missing"])
    assert all(all(item.values()) for item in facts["missing"])
    return {item["what"] for item in facts["missing"]}


def facts_of(facts, device):
    return next((cell for cell in facts["auto"] if cell["device"] == device), None)


GRID = TokenGrid(1, 1, 1)
GPU_AND_CPU = [("cpu", "cpu"), ("cuda", "triton")]
NO_GPU, NO_TORCH = "a GPU", "a torch that sees the GPU of this machine"


def test_avx512_is_missing_where_the_cpu_has_none(machine):
    assert missing(machine()) == {NO_GPU}
    assert missing(machine(flags="avx2 fma avx512f_like")) == {NO_GPU, "AVX-512"}
    assert missing(machine(flags="avx512f")) == {NO_GPU}


def test_facts_of_the_cpu_come_from_the_first_of_the_list(machine):
    facts = machine()["cpu"]
    assert facts["name"] == "A CPU: fast"
    assert facts["flags"] == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert facts["avx512"] is facts["bf16"] is True
    for flags, avx512, bf16 in (
        ("avx2", False, False),
        ("avx512f", True, False),
        ("avx512f avx512_bf16", True, True),
        ("amx_bf16", False, True),
    ):
        facts = machine(flags=flags)["cpu"]
        assert (facts["avx512"], facts["bf16"]) == (avx512, bf16), flags
        assert facts["flags"] == flags.split()
    assert machine()["cpu"]["threads"] == torch.get_num_threads()


def test_a_gpu_is_missing_or_the_torch_that_sees_it_but_never_both(machine):
    assert missing(machine()) == {NO_GPU}
    assert missing(machine(driver=True)) == {NO_TORCH}
    for driver in (False, True):
        assert missing(machine(gpus=1, driver=driver)) == set()


def test_the_engine_of_the_gpu_is_missing_only_beside_a_gpu_that_runs_dense(machine):
    facts = machine(gpus=2)
    assert facts["gpu"] == {
        "name": "A GPU",
        "capability": "9.0",
        "memory_gib": 80.0,
        "count": 2,
    }
    assert missing(facts) == set()
    lines = doctor.report(facts).splitlines()
    assert not [s for s in lines if s.startswith("engine") and "not here" in s]
    assert [(c["device"], c["executor"]) for c in facts["auto"]] == GPU_AND_CPU
    assert facts["dense_backends"]["device"] == "cuda"
    old = machine(gpus=1, refusal="too old")
    assert facts_of(old, "cuda")["passed"] == {"triton": "too old"}
    assert "not triton: too old" in doctor.report(old)
    assert old["executors"]["triton"]["missing"] == "too old"
    assert missing(old) == {"a sparse engine for the GPU"}
    assert facts_of(machine(), "cuda") is None and machine()["gpu"] is None
    assert machine()["dense_backends"]["device"] == "cpu"


def test_ffmpeg_and_the_demo_model_are_missing_if_they_are_not_found(machine, monkeypatch):
    import imageio_ffmpeg

    def broken(*args):
        raise RuntimeError("no ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", broken)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_version", broken)
    assert missing(machine()) == {NO_GPU, "ffmpeg"}
    assert "ffmpeg          missing" in doctor.report(machine())
    monkeypatch.setattr(shipped, "DEMO", "assets/nowhere")
    facts = machine()
    assert missing(facts) == {NO_GPU, "ffmpeg", "the demo model"} and facts["demo_model"] is None


def test_a_person_reads_the_same_facts(machine):
    facts = machine(flags="avx2")
    text = doctor.report(facts)
    listed, _, lacking = text.partition("\nmissing\n")
    for what in (NO_GPU, "AVX-512"):
        assert f"  {what}\n    costs: " in lacking
    assert "A CPU: fast" in listed and "no AVX" not in listed and "math on cpu" in listed
    assert "no AVX" in doctor.report(machine(flags="sse2"))
    whole = doctor.report(machine(gpus=1))
    assert "missing\n" not in whole and "A GPU, 9.0, 80.0, 1" in whole


def test_the_real_machine_is_examined_without_a_fake():
    """What the fakes stand for is read in this form on Linux."""
    facts = doctor.examine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and "avx512f" in info.read_text():
        assert facts["cpu"]["avx512"] and "AVX-512" not in missing(facts)
    assert torch.cuda.is_available() == (facts["gpu"] is not None)
