"""The compile gate of the libraries, without them: what it would compile, and what it says."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the gate is about compiled kernels", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "aot"))
import engines_gate
from engines_gate import Case, Compiler, Kernel

from vidsparse.kernels.gpu import support


def test_a_missing_library_is_an_error_if_it_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines_gate, "lacking", lambda name: f"{name}-wheel is not installed")
    for flags, status in (([], 0), (["--require"], 1), (["--only", "fa4", "--require"], 1)):
        monkeypatch.setattr(sys, "argv", ["engines_gate.py", *flags])
        assert engines_gate.main() == status
        said = capsys.readouterr().out.splitlines()
        wanted = ["fa4"] if "--only" in flags else ["cudnn", "fa4"]
        assert said == [f"{name}: {name}-wheel is not installed" for name in wanted]


def test_every_call_that_is_not_refused_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "lacks", lambda *_: None)
    found = {arch: engines_gate.cases(["cudnn", "fa4"], arch, True) for arch in ("90", "100")}
    assert {one.engine for one in found["90"]} == {"cudnn", "fa4"}
    assert {one.engine for one in found["100"]} == {"cudnn"}
    dims = {(one.engine, one.dtype, one.head_dim): one.blocks for one in found["90"]}
    assert len(dims) == 2 * 3 + 2 * 4
    assert len(dims["cudnn", torch.float16, 96]) == 4 and (64, 16) in dims["fa4", torch.float16, 40]


def test_a_call_that_does_not_compile_is_a_row_that_is_not_good() -> None:
    case = Case("fa4", "90", torch.bfloat16, 64, ((64, 64),))
    cells, good = engines_gate.table_row(case, Kernel(reason="so", blocks=["64x64"]))
    assert cells[:5] == ("fa4", "sm_90", "bfloat16", "64", "64x64") and not good
    assert cells[-1] == "does not compile: so" and len(cells) == len(engines_gate.COLUMNS)


def test_the_compiler_keeps_and_launches_nothing() -> None:
    class Made:
        class artifacts:
            CUBIN = b"code"

    given = {}

    def compile_it(*operands: object, options: str) -> type[Made]:
        given.update(operands=operands, options=options)
        return Made

    compiler = Compiler(compile_it)
    launch = compiler(support, 1, 2, options="--enable-tvm-ffi")
    assert given["operands"] == (support, 1, 2)
    assert given["options"].startswith("--enable-tvm-ffi --keep-cubin --dump-dir=")
    assert [one.cubin for one in compiler.compiled] == [b"code"] and not compiler.launched
    launch(1, 2)
    assert compiler.launched == compiler.compiled
