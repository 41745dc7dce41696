"""The compile gate, without compiling: it sees every kernel, and every bound can be broken."""

import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the gate is about compiled kernels", allow_module_level=True)

import triton

import vidsparse.kernels.gpu

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "aot"))
import aot_cases
from aot_inspect import Found, amd_code
from aot_launches import Launch
from aot_targets import ARCHITECTURES
from gate import table_row

HOPPER = "sparse_forward_hopper"
GOOD = Found(128, 0, 0, 100_000, 8, 8, (3, 3), (2,), True)


def kernels() -> set[str]:
    """All that is launched from the host: the others are inlined into these."""
    found = set()
    for path in Path(vidsparse.kernels.gpu.__file__).parent.glob("[a-z]*.py"):
        for name, value in vars(import_module(f"vidsparse.kernels.gpu.{path.stem}")).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                found.add(name.removesuffix("_kernel"))
    return found


@pytest.mark.parametrize("name", ["80", "90"])
def test_every_kernel_is_launched_and_none_compiled_anew(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for the first length, found again at the others."""
    monkeypatch.setattr(aot_cases, "WIDTHS", (100,))
    found, anew = aot_cases.launches(ARCHITECTURES[name], full=False)
    expected = kernels() - ({HOPPER} if name == "80" else set())
    assert {launch.kernel for launch in found} == expected
    assert not anew and len({(one.kernel, one.form) for one in found}) == len(found)


def launch(
    arch: str = "90",
    kernel: str = "sparse_forward",
    kind: str = "bf16",
    maxnreg: int | None = None,
    **constants: Any,
) -> Launch:
    constants = {"STAGES": 3, **constants}
    function = SimpleNamespace(__name__=f"{kernel}_kernel", arg_names=["p_q", *constants])
    source = SimpleNamespace(
        fn=function,
        signature={"p_q": f"*{kind}", **dict.fromkeys(constants, "constexpr")},
        constants={(1 + n,): value for n, value in enumerate(constants.values())},
    )
    return Launch(ARCHITECTURES[arch], source, {"maxnreg": maxnreg, "num_warps": 8})


@pytest.mark.parametrize(
    ("found", "asked", "broken"),
    [
        ({}, {}, []),
        ({"spills": 1}, {}, ["spills"]),
        ({"spills": 201}, {"kind": "fp32"}, ["spills"]),
        ({"spills": 200, "tensor_core": 0, "ring": ()}, {"kind": "fp32"}, []),
        ({"shared": 232_449}, {}, ["shared > 232448"]),
        ({"shared": 115_713}, {"maxnreg": 128}, ["shared > 115712"]),
        ({"shared": 65_537}, {"arch": "gfx942"}, ["shared > 65536"]),
        ({"tensor_core": 0}, {}, ["no tensor core"]),
        ({"tensor_core": 0}, {"kernel": "draft_scores", "kind": "fp32"}, ["no tensor core"]),
        ({"tensor_core": 0}, {"kernel": "select", "kind": "fp32"}, []),
        ({"integer_core": 0}, {"QK8": True}, ["no int8 on tensor cores"]),
        ({"specialised": False}, {"SPECIALISED": True}, ["warps not specialised"]),
        ({"ring": (3, 2)}, {}, ["ring < 3"]),
        ({"ring": (2, 2)}, {"arch": "80"}, []),
        ({"ring": (3, 3, 2, 2), "waits": (2, 2)}, {"MASKED": True, "SPLIT": True}, ["ring < 3"]),
        ({"ring": (3, 3, 2, 2)}, {"MASKED": True, "SPLIT": False}, []),
        ({"waits": (0, 0)}, {}, ["every wait drains the queue"]),
        (
            {"waits": (2, 0), "ring": (3,) * 4},
            {"MASKED": True, "SPLIT": True},
            ["every wait drains the queue"],
        ),
        ({"waits": ()}, {"kernel": HOPPER}, []),
    ],
)
def test_bounds(found: dict[str, Any], asked: dict[str, Any], broken: list[str]) -> None:
    assert replace(GOOD, **found).breaches(launch(**asked)) == broken


def test_rows() -> None:
    bad = replace(GOOD, spills=9)
    assert table_row(launch(), bad, anew=False, counted=True)[0][-1] == "spills"
    cells, good = table_row(launch(), bad, anew=False, counted=False)
    assert cells[-1] == "extra: spills" and not good
    assert table_row(launch(), GOOD, anew=True, counted=True) == (
        ("sparse_forward", "bf16 STAGES 3", "sm_90", "8", "128", "0", "97.7", "8", "3/3 ws",
         "compiled anew"),
        False,
    )  # fmt: skip


def test_amd_registers_and_spills_are_those_of_its_assembly() -> None:
    text = """
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    .sgpr_count:     60
    .sgpr_spill_count: 3
    .vgpr_count:     256
    .vgpr_spill_count: 57
    """
    code = amd_code({"amdgcn": text})
    assert (code.registers, code.scalars, code.spills) == (256, 63, 57)
