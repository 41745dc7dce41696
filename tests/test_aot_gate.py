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
import gate
from aot_inspect import Found, amd_code
from aot_launches import Launch
from aot_loops import Loop, loops_of
from aot_targets import ARCHITECTURES
from gate import table_row

HOPPER = "exact_tiles_hopper"
GOOD = Found(128, 0, 0, 100_000, 8, 8, (3, 3), (2,))


def kernels() -> set[str]:
    """All that is launched from the host: the others are inlined into these."""
    found = set()
    folder = Path(vidsparse.kernels.gpu.__file__).parent
    for path in folder.glob("[a-z]*.py"):
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
    kernel: str = "exact_tiles",
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
        ({"spills": 401}, {"kind": "fp32"}, ["spills"]),
        ({"spills": 400, "tensor_core": 0, "ring": ()}, {"kind": "fp32"}, []),
        ({"shared": 232_449}, {}, ["shared > 232448"]),
        ({"shared": 115_713}, {"maxnreg": 128}, ["shared > 115712"]),
        ({"shared": 65_537}, {"arch": "gfx942"}, ["shared > 65536"]),
        ({"tensor_core": 0}, {}, ["no tensor core"]),
        ({"tensor_core": 0}, {"kernel": "draft_scores", "kind": "fp32"}, ["no tensor core"]),
        ({"tensor_core": 0}, {"kernel": "draft_spread", "kind": "fp32"}, ["no tensor core"]),
        ({"tensor_core": 0}, {"kernel": "select", "kind": "fp32"}, []),
        ({"integer_core": 0}, {"QK8": True}, ["no int8 on tensor cores"]),
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
        ({"loops": (Loop(374, 12, 12),)}, {}, ["products serialised"]),
        ({"loops": (Loop(353, 12, 2), Loop(120, 2, 2))}, {}, []),
        ({"warnings": ("C7512: wgmma serialized",)}, {}, ["ptxas: C7512: wgmma serialized"]),
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
        ("exact_tiles", "bf16 STAGES 3", "sm_90", "8", "128", "0", "97.7", "8", "3/3", "", "2",
         "compiled anew"),
        False,
    )  # fmt: skip


def test_a_slower_loop_stands_beside_the_saved_one() -> None:
    found = replace(GOOD, loops=(Loop(353, 12, 2),), registers=139)
    saved = {("exact_tiles", "bf16 STAGES 3", "sm_90"): {"loop": "320", "programs": "1"}}
    cells, _ = table_row(launch(), found, anew=False, counted=True, former=saved)
    assert cells[-3:] == ("353 (was 320)", "1", "ok")


def test_saved_rows_of_other_versions_and_architectures_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(version: str, arch: str, registers: str) -> dict[str, str]:
        known = {"triton": version, "arch": arch, "registers": registers}
        return dict.fromkeys(gate.FIELDS, "x") | known

    here = triton.__version__
    monkeypatch.setattr(gate, "KEPT", tmp_path / "gate.csv")
    gate.save([row(here, arch, "1") for arch in ("sm_80", "sm_90")], {"sm_80", "sm_90"})
    monkeypatch.setattr(triton, "__version__", "0.1")
    gate.save([row("0.1", "sm_90", "2")], {"sm_90"})
    monkeypatch.setattr(triton, "__version__", here)
    gate.save([row(here, "sm_90", "3")], {"sm_90"})
    lines = gate.KEPT.read_text().splitlines()[1:]
    assert [(one.split(",")[0], *one.split(",")[3:6:2]) for one in lines] == [
        ("0.1", "sm_90", "2"), (here, "sm_80", "1"), (here, "sm_90", "3")
    ]  # fmt: skip
    assert {key[2]: one["registers"] for key, one in gate.kept().items()} == {
        "sm_80": "1", "sm_90": "3"
    }  # fmt: skip


def test_loops_of_machine_code() -> None:
    """The innermost loop with products; the loop of the program around it is none."""
    lines = ["MOV R1, R2", "HGMMA.64x64x16.F32 R8", "FADD R1, R1", "@P0 BRA 0x10", "NOP",
             "@P1 BRA 0x40", "@!P2 BRA `(.L_x_1)", "BRA 0x0"]  # fmt: skip
    text = "\n".join(f"        /*{16 * n:04x}*/   {line} ;" for n, line in enumerate(lines))
    assert loops_of(text, "HGMMA") == (Loop(3, 1, 0),)
    fenced = text.replace("FADD R1, R1", "WARPGROUP.ARRIVE")
    assert loops_of(fenced, "HGMMA") == (Loop(3, 1, 1),) and not loops_of(text, "HMMA")


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
