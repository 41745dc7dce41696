"""Compiles the Triton kernels for GPUs that are not here and looks at the machine code.

    python kernels/aot_gate.py                             sm_80, sm_90, sm_100
    python kernels/aot_gate.py --arch 80,89,90,100,120     all that have been looked at

One row per kernel, architecture and form, in the tiling that the engine would choose. Exit status 1
if a bound is broken: no spills (a few for float32), shared memory within a block's limit, tensor
cores in use, K and V really pipelined (`ring`: buffers of each). It shows neither that results are
right nor how fast they come. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidsparse.kernels import triton_forward
from vidsparse.kernels.triton_forward import HEAD_DIMS, tiling

TOOLS = Path(nvidia.__file__).parent / "bin"
ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Dynamic shared memory of one block, bytes."""

TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
ASYNCHRONOUS = (90, 100)
"""Here the pipeliner keeps as many buffers as stages, elsewhere one less."""

FLOAT32_SPILLS = 200
"""Allowed for float32, whose exact products use no tensor cores: it is there to be right."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One compilation. arguments: type[:divisibility] or constexpr value by name."""

    kernel: Any
    arch: int
    form: str
    arguments: dict[str, Any]
    warps: int
    dtype: torch.dtype
    stages: int = 0


@dataclass(frozen=True)
class Found:
    registers: int
    spills: int
    shared: int
    tensor_core: int
    ring: tuple[int, ...]
    waits: tuple[int, ...]

    def breaches(self, case: Case) -> list[str]:
        broken = []
        if self.spills > FLOAT32_SPILLS * (case.dtype == torch.float32):
            broken.append("spills")
        if self.shared > SHARED[case.arch]:
            broken.append(f"shared > {SHARED[case.arch]}")
        if case.dtype != torch.float32 and not self.tensor_core:
            broken.append("no tensor core")
        depth = case.stages - (case.arch not in ASYNCHRONOUS)
        if case.stages and sum(buffers >= depth for buffers in self.ring) < 2:
            broken.append(f"ring < {depth}")
        if depth >= 3 and not any(self.waits):
            broken.append("every wait drains the queue")
        return broken


def forward_cases(arch: int) -> Iterator[Case]:
    """Every form of the forward for bf16, and the plainest and fullest for the other types."""
    forms = {"plain": (False, False), "masked": (True, False), "masked+rest": (True, True)}
    capability = divmod(arch, 10)
    for dtype, padded, (form, (masked, rest)) in (
        (dtype, padded, item) for dtype in TYPES for padded in HEAD_DIMS for item in forms.items()
    ):
        if dtype != torch.bfloat16 and form == "masked":
            continue
        for depth in {padded, 96} if padded == 128 and dtype == torch.bfloat16 else {padded}:
            shape = tiling(dtype, capability, 128, 128)
            arguments = {
                **dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{TYPES[dtype]}:16"),
                **dict.fromkeys(("p_bias", "p_lse", "p_rest"), "*fp32:16"),
                **dict.fromkeys(("p_entry", "p_count", "p_rows"), "*i32:16"),
                **dict.fromkeys(("p_bits", "p_start"), "*i64:16"),
                **strides("q", "batch", "head", "token"),
                **strides("out", "batch", "head", "token"),
                **strides("key", "batch", "head"),
                **{"scale": "fp32", "D": depth, "DP": padded, "PARTS": 128 // shape.block_m},
                **{"BM": shape.block_m, "BN": shape.block_n, "STAGES": shape.stages},
                **{"MASKED": masked, "REST": rest},
            }
            yield Case(
                triton_forward.sparse_forward_kernel,
                arch,
                f"{TYPES[dtype]} D {depth} {form} {shape.block_m}x{shape.block_n}",
                arguments,
                shape.warps,
                dtype,
                shape.stages if dtype != torch.float32 else 0,
            )


def first_order_cases(arch: int) -> Iterator[Case]:
    for dtype in TYPES:
        block_m = triton_forward.first_order_rows(dtype)
        for padded in HEAD_DIMS:
            arguments = {
                **dict.fromkeys(("p_q", "p_moment", "p_out"), f"*{TYPES[dtype]}:16"),
                **{"p_rest": "*fp32:16", "scale": "fp32", "D": padded, "DP": padded},
                **strides("q", "batch", "head", "token"),
                **strides("out", "batch", "head", "token"),
                **{"BM": block_m, "BK": triton_forward.FIRST_ORDER_STEP},
            }
            form = f"{TYPES[dtype]} D {padded} {block_m} rows"
            yield Case(triton_forward.add_first_order_kernel, arch, form, arguments, 4, dtype)


def strides(tensor: str, *axes: str) -> dict[str, str]:
    return {f"{tensor}_{axis}": "i32:16" for axis in axes}


def inspect(case: Case) -> Found:
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(case.kernel.params):
        value = case.arguments.get(parameter.name, "i32")
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name], _, divisor = value.partition(":")
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.warps, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (dump(flag, cubin.name) for flag in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spills = len(re.findall(r"\b(?:STL|LDL)[. ]", code)) + int(found[2])
    ir = compiled.asm["ttgir"]
    ring = re.findall(r"local_alloc\s*:\s*\(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32)", ir)
    waits = re.findall(r"async_wait [^{]*\{num = (\d+)", ir)
    return Found(
        int(found[1]),
        spills,
        compiled.metadata.shared,
        len(re.findall(rf"\b(?:{TENSOR_CORE[case.arch]})\b", code)),
        tuple(map(int, ring)),
        tuple(map(int, waits)),
    )


def dump(flag: str, path: str) -> str:
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    command = [str(TOOLS / "cuobjdump"), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help=f"of {ARCHITECTURES}")
    parser.add_argument(
        "--only", default="", help="a piece of the form's name, such as 'bf16 D 64'"
    )
    options = parser.parse_args()
    if triton_forward.interpreted():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    architectures = [int(arch) for arch in options.arch.split(",")]
    if not set(architectures) <= set(ARCHITECTURES):
        parser.error(f"--arch {options.arch}: allowed are {ARCHITECTURES}")
    columns = ("arch", "kernel", "form", "warps", "registers", "spills", "shared", "tensor core")
    table = Table(*columns, "ring", "verdict", title=f"triton {triton.__version__}")
    broken = 0
    for arch in architectures:
        for case in (*forward_cases(arch), *first_order_cases(arch)):
            if options.only not in case.form:
                continue
            found = inspect(case)
            verdict = found.breaches(case)
            broken += bool(verdict)
            numbers = (case.warps, found.registers, found.spills, found.shared, found.tensor_core)
            name = case.kernel.__name__.removesuffix("_kernel")
            ring = "/".join(map(str, found.ring))
            table.add_row(
                f"sm_{arch}", name, case.form, *map(str, numbers), ring, "; ".join(verdict) or "ok"
            )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
