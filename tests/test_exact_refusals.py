"""What the exact engines say on machines and calls that are not theirs; no GPU, no library."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from itertools import product

import pytest
import torch

from vidsparse import SparseConfig, doctor, registry
from vidsparse.kernels.gpu import exact, support
from vidsparse.kernels.gpu.exact import ExactEngine, Question

GPU = torch.device("cuda:0")
PACKAGES = {"cudnn": ("nvidia-cudnn-frontend", "1.32.0"), "fa4": ("flash-attn-4", "4.0.0b36")}
CURE = 'pip install "vidsparse[hopper]"'


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A GPU of a capability, and the release of every package, None: not installed."""

    def set_up(capability: tuple[int, int] = (9, 0), release: str | None = None) -> None:
        def version(package: str) -> str:
            if release is None:
                raise PackageNotFoundError(package)
            return release

        monkeypatch.setattr(support, "refusal", lambda device: None)
        monkeypatch.setattr(support, "capability", lambda device: capability)
        monkeypatch.setattr(support, "version", version)
        monkeypatch.setattr(support, "import_module", lambda name: None)
        support.lacks.cache_clear()

    yield set_up
    support.lacks.cache_clear()


def engine(name: str) -> ExactEngine:
    found: ExactEngine = registry.engine(name)
    return found


def asked(dtype=torch.bfloat16, head_dim=128, block_q=128, block_k=128, form="auto") -> Question:
    return Question(GPU, dtype, head_dim, block_q, block_k, form)


def test_an_amd_gpu_runs_no_library(machine):
    machine(support.AMD, "99")
    for name in PACKAGES:
        assert str(engine(name).available(GPU)).startswith("an AMD GPU: ")


def test_a_device_that_nobody_knows_is_remarked_on_once(machine, caplog: pytest.LogCaptureFixture):
    for capability, said in (
        (support.AMD, "untested on AMD GPUs"),
        ((13, 1), "compute capability 13.1 is unknown"),
        ((12, 1), None),
        ((8, 0), None),
    ):
        machine(capability)
        caplog.clear()
        support.say_remark.cache_clear()
        for _ in range(2):
            support.say_remark(GPU)
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == (said is not None) and all(text.startswith(said) for text in found)
    support.say_remark.cache_clear()


def test_libraries_are_asked_that_have_figures():
    """The order is that of the fastest whole calls in kernels/results/gpu_presets.csv."""
    assert exact.PREFERRED == ("fa4", "triton")
    assert set(registry.engines()) == {"triton", *PACKAGES}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_and_its_release(name: str, machine):
    package, least = PACKAGES[name]
    machine()
    assert engine(name).available(GPU) == f"{package} is not installed; {CURE}"
    for old in ("0.9", least.replace("36", "35") if "b" in least else "1.31.9"):
        machine(release=old)
        wanted = f"{package} {old}: needed is {least} or newer; {CURE}"
        assert engine(name).available(GPU) == wanted
    for new in (least, "4.0.0", "9.1rc1"):
        machine(release=new)
        assert engine(name).available(GPU) is None


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_broken_is_not_taken(name: str, machine, monkeypatch: pytest.MonkeyPatch):
    """What it needs may be missing, or of another release: `auto` goes on to the next engine."""
    machine(release="99")

    def broken(module: str) -> None:
        raise AttributeError(f"{module} has no\nsuch thing")

    monkeypatch.setattr(support, "import_module", broken)
    why = engine(name).available(GPU)
    assert why is not None and why.startswith(f"{PACKAGES[name][0]} 99 cannot be imported (Attrib")
    assert "such thing" in why and "\n" not in why and why.endswith(CURE)
    assert exact.chosen("auto", asked()).name == "triton"
    with pytest.raises(ValueError, match="cannot be imported"):
        exact.chosen(name, asked())


@pytest.mark.parametrize("name", PACKAGES)
def test_a_device_comes_before_the_package(name: str, machine, monkeypatch: pytest.MonkeyPatch):
    """Nobody is told to install what would not run."""
    takes = {"cudnn": (9, 10, 11, 12), "fa4": (9,)}[name]
    for major in range(8, 14):
        machine((major, 0), "99")
        why = engine(name).available(GPU)
        if major in takes:
            assert why is None
        else:
            assert why is not None and why.startswith(f"compute capability ({major}, 0): ")
            machine((major, 0))
            assert engine(name).available(GPU) == why
    monkeypatch.setattr(support, "refusal", lambda device: "no CUDA device")
    assert engine(name).available(GPU) == "no CUDA device"


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"form": "tma"}, "form 'tma': forms are of engine 'triton'; use form 'auto'"),
        ({"dtype": torch.float32}, "torch.float32: .* bfloat16 and float16"),
        ({"head_dim": 44}, "head dim 44: .* takes "),
        ({"block_q": 32}, "blocks of 32 .* takes 64(,| and) 128"),
    ],
)
def test_refusals(name: str, changed, why: str, machine):
    machine()
    assert engine(name).refuses(asked()) is None
    found = engine(name).refuses(asked(**changed))
    assert found is not None and re.match(why, found)


def test_what_fa4_takes(machine):
    machine()
    one, dims = engine("fa4"), (8, 40, 64, 96, 128)
    for block_q, block_k, depth in product(support.BLOCK_SIZES, support.BLOCK_SIZES, dims):
        question = asked(block_q=block_q, block_k=block_k, head_dim=depth)
        assert (one.refuses(question) is None) == (block_q in (64, 128))
        assert one.tile(question) == block_k


@pytest.mark.parametrize(
    ("major", "block", "dims", "half"),
    [
        (9, 64, (64, 96, 128), True),
        (9, 128, (64, 96, 128), True),
        (10, 64, (128,), False),
        (10, 128, (64, 96, 128), True),
        (11, 64, (128,), False),
        (11, 128, (64, 96, 128), True),
        (12, 64, (128,), True),
        (12, 128, (128,), True),
    ],
)
def test_what_cudnn_takes(major: int, block: int, dims, half: bool, machine):
    """The table of its documentation, by generation and block."""
    machine((major, 0))
    one = engine("cudnn")
    pairs = [pair for pair in product(support.BLOCK_SIZES, repeat=2) if min(pair) == block]
    for (block_q, block_k), depth in product(pairs, (32, 64, 96, 128)):
        question = asked(block_q=block_q, block_k=block_k, head_dim=depth)
        assert (one.refuses(question) is None) == (depth in dims)
        assert one.tile(question) == block
        both = asked(torch.float16, depth, block_q, block_k)
        assert (one.refuses(both) is None) == (half and depth in dims)
    assert one.refuses(asked(block_k=32)) == "blocks of 128 x 32 tokens: cuDNN takes 64 and 128"


def test_a_chosen_engine_that_is_not_there_is_refused_with_the_cure(machine):
    machine()
    for name, (package, _) in PACKAGES.items():
        words = rf"^kernel.engine='{name}': {package} is not installed; pip install"
        with pytest.raises(ValueError, match=words):
            exact.chosen(name, asked())


def test_configs_name_them_and_doctor_shows_them(machine):
    for name in PACKAGES:
        assert SparseConfig.load("tiles", [f"kernel.engine={name}"]).kernel.engine == name
    machine((8, 0))
    facts = doctor._exact_engines()
    found = {name: one["missing"] for name, one in facts.items()}
    assert found["triton"] is None and found["fa4"] == engine("fa4").available(GPU)
    text = "\n".join(doctor._lines("exact", facts))
    for name in PACKAGES:
        assert f"exact {name}" in text and f"not here: {found[name]}" in text


def test_doctor_says_what_is_untested(machine):
    engines = registry.executors()
    for capability, said in ((support.AMD, "untested on AMD GPUs"), ((9, 0), None)):
        machine(capability)
        found = doctor._remark_of(engines["triton"])
        assert found is None if said is None else said in found
        facts = {"about": "it", "missing": None, "remark": found}
        (line,) = doctor._lines("engine", {"triton": facts})
        assert ("untested" in line) == (said is not None)


def test_asking_imports_no_library():
    code = (
        "import sys, torch; from vidsparse import registry\n"
        "from vidsparse.kernels.gpu import support\n"
        "support.refusal = lambda device: None; support.capability = lambda device: (9, 0)\n"
        "for name in registry.engines(): registry.engine(name).available(torch.device('cuda'))\n"
        "print(sorted({'cudnn', 'flash_attn', 'cutlass', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
