"""Compiles one launch ahead of time and reads its machine code and intermediate code."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from aot_launches import Launch
from aot_loops import Loop, loops_of
from triton.backends import nvidia

TOOLS = Path(nvidia.__file__).parent / "bin"
REGISTERS = 65_536
"""Of a multiprocessor."""

FLOAT32_SPILLS = 400
"""Allowed for exact products of float32, which are there to be right."""


@dataclass(frozen=True)
class Code:
    """Machine code as text. registers, spills: a thread's.

    scalars: registers that a warp wants on AMD; those past 106 are lanes of the others, no memory.
    """

    text: str
    registers: int
    spills: int
    scalars: int = 0


@dataclass(frozen=True)
class Found:
    """shared: bytes; tensor_core, integer_core: instructions; ring: buffers of keys and values.

    threads: of a program; loops: the innermost ones with tensor cores in them; warnings: of ptxas,
    if it ran.
    """

    registers: int
    scalars: int
    spills: int
    shared: int
    tensor_core: int
    integer_core: int
    ring: tuple[int, ...]
    waits: tuple[int, ...]
    threads: int = 256
    loops: tuple[Loop, ...] = ()
    warnings: tuple[str, ...] = ()

    def programs(self, launch: Launch) -> int:
        """That fit a multiprocessor, by registers and shared memory."""
        by_registers = REGISTERS // max(1, -(-self.registers // 8) * 8 * self.threads)
        return min(by_registers, launch.arch.programs(self.shared))

    def breaches(self, launch: Launch) -> list[str]:
        broken = []
        if self.spills > FLOAT32_SPILLS * launch.exact:
            broken.append("spills")
        limit = launch.arch.half_shared if launch.limited else launch.arch.shared
        if self.shared > limit:
            broken.append(f"shared > {limit}")
        if launch.multiplies and not self.tensor_core:
            broken.append("no tensor core")
        if launch.multiplies_int8 and not self.integer_core:
            broken.append("no int8 on tensor cores")
        if self.warnings:
            broken.append("ptxas: " + self.warnings[0])
        if any(loop.serialised for loop in self.loops):
            broken.append("products serialised")
        buffers, loops = launch.buffers, launch.loops
        if buffers and sum(have >= buffers for have in self.ring) < 2 * loops:
            broken.append(f"ring < {buffers}")
        by_pointer = launch.kernel in ("exact_tiles", "levels_forward")
        if buffers >= 3 and by_pointer and sum(wait > 0 for wait in self.waits) < loops:
            broken.append("every wait drains the queue")
        return broken


def inspect(launch: Launch) -> Found:
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = launch.compile()
    read = amd_code if launch.arch.target.backend == "hip" else nvidia_code
    code = read(compiled.asm)
    ir = compiled.asm["ttgir"]
    ring = re.findall(
        r"local_alloc\s*:\s*\(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32|i8)", ir
    )
    waits = re.findall(r"async_wait [^{]*\{num = (\d+)", ir)
    threads = launch.arch.target.warp_size * compiled.metadata.num_warps
    warnings = re.findall(r"warning\s*:\s*(.*\b(?:C7512|serializ).*)", said.getvalue())
    return Found(
        code.registers,
        code.scalars,
        code.spills,
        compiled.metadata.shared,
        len(re.findall(rf"\b(?:{launch.products[0]})\b", code.text)),
        len(re.findall(rf"\b(?:{launch.products[1]})\b", code.text)),
        tuple(map(int, ring)),
        tuple(map(int, waits)),
        threads,
        loops_of(code.text, launch.products[0]),
        tuple(one.strip()[:60] for one in warnings),
    )


def nvidia_code(asm: dict[str, Any]) -> Code:
    """SASS; a spill is an instruction that touches the stack, or a byte of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage, text = (dump(flag, cubin.name) for flag in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Code(text, int(found[1]), len(re.findall(r"\b(?:STL|LDL)[. ]", text)) + int(found[2]))


def amd_code(asm: dict[str, Any]) -> Code:
    """Assembly, which counts registers and spilled ones at its end."""
    text = asm["amdgcn"]
    fields = ("vgpr_count", "vgpr_spill_count", "sgpr_count", "sgpr_spill_count")
    found = [re.search(rf"\.{field}:\s+(\d+)", text) for field in fields]
    registers, spills, scalars, moved = (int(one[1]) for one in found if one)
    return Code(text, registers, spills, scalars + moved)


def dump(flag: str, path: str) -> str:
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    command = [str(TOOLS / "cuobjdump"), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
