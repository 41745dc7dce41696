"""Compiles the Triton kernels for GPUs that are not here and looks at the machine code.

    python kernels/aot_gate.py                             sm_80, sm_90, sm_100
    python kernels/aot_gate.py --arch 80,89,90,100,120     all that have been looked at
    python kernels/aot_gate.py --full                      every dtype, head dim and content

One row per kernel, form and architecture, in the tiling that the engine would choose. Exit status 1
if a bound is broken: no spills (a few for float32), shared memory within a block's limit or, where
the tiling counts on it, within half of a multiprocessor, tensor cores in use, K and V really
pipelined (`ring`: buffers of each), warps specialised. It shows neither that results are right nor
how fast they come. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidsparse.kernels import (
    triton_draft,
    triton_forward,
    triton_forward_hopper,
    triton_lists,
    triton_pool,
    triton_quant,
    triton_select,
    triton_taylor,
)
from vidsparse.kernels.triton_forward import HEAD_DIMS, Tiling, tiling

TOOLS = Path(nvidia.__file__).parent / "bin"
ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Dynamic shared memory of one block, bytes."""

HALF_SHARED = 115_712
"""Of two blocks on one multiprocessor of sm_90 or sm_100, bytes each."""

TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
INTEGER_CORE = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA|IMMA", 120: "IMMA"}
ASYNCHRONOUS = (90, 100)
"""Here the pipeliner keeps as many buffers as stages, elsewhere one less."""

FLOAT32_SPILLS = 200
"""Allowed for float32, whose exact products use no tensor cores: it is there to be right."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CONTENTS = {"plain": (False, False), "masked": (True, False), "masked+rest": (True, True)}
"""What lists carry: bits, `rest` marks."""


@dataclass(frozen=True)
class Case:
    """One compilation. arguments: type[:divisibility] or constexpr value by name.

    products: what the tensor cores multiply, "float", "float+int8" or "" for none; registers: the
    limit, which stands for two blocks on a multiprocessor; specialised: warps must be.
    """

    kernel: Any
    arch: int
    form: str
    arguments: dict[str, Any]
    warps: int
    dtype: torch.dtype
    stages: int = 0
    products: str = "float"
    registers: int | None = None
    specialised: bool = False

    @property
    def plain_int8(self) -> bool:
        """sm_100 before Triton 3.9: int8 products take the instructions, and buffers, of sm_80."""
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        return self.arch == 100 and self.products == "float+int8" and version < (3, 9)


@dataclass(frozen=True)
class Found:
    registers: int
    spills: int
    shared: int
    tensor_core: int
    integer_core: int
    ring: tuple[int, ...]
    waits: tuple[int, ...]
    descriptors: bool
    specialised: bool

    def breaches(self, case: Case) -> list[str]:
        broken = []
        if self.spills > FLOAT32_SPILLS * (case.dtype == torch.float32 and case.products != ""):
            broken.append("spills")
        limit = SHARED[case.arch] if case.registers is None else HALF_SHARED
        if self.shared > limit:
            broken.append(f"shared > {limit}")
        if case.dtype != torch.float32 and case.products and not self.tensor_core:
            broken.append("no tensor core")
        if case.products == "float+int8" and not self.integer_core:
            broken.append("no int8 on tensor cores")
        if case.specialised and not self.specialised:
            broken.append("warps not specialised")
        depth = case.stages - (case.arch not in ASYNCHRONOUS or case.plain_int8)
        if case.stages and sum(buffers >= depth for buffers in self.ring) < 2:
            broken.append(f"ring < {depth}")
        if depth >= 3 and not self.descriptors and not any(self.waits):
            broken.append("every wait drains the queue")
        return broken


def forward_cases(arch: int, full: bool) -> Iterator[Case]:
    """The pointer form."""
    shipped = {
        (torch.bfloat16, 128, "plain"),
        (torch.bfloat16, 128, "masked+rest"),
        (torch.bfloat16, 64, "masked+rest"),
        (torch.float32, 128, "masked+rest"),
    }
    for dtype, depth, contents in product(TYPES, (64, 96, 128), CONTENTS):
        if full or (dtype, depth, contents) in shipped:
            shape = tiling(dtype, divmod(arch, 10), 128, 128)
            yield forward_case(arch, "pointer", dtype, depth, contents, shape)
    for depth, contents in product(HEAD_DIMS, CONTENTS):
        if full or (depth, contents) == (128, "masked+rest"):
            shape = tiling(torch.bfloat16, divmod(arch, 10), 128, 128)
            yield forward_case(arch, "pointer", torch.bfloat16, depth, contents, shape, int8=True)


def hopper_cases(arch: int, full: bool) -> Iterator[Case]:
    """The forms with TMA."""
    if arch not in ASYNCHRONOUS:
        return
    shipped = {(128, "plain"), (128, "masked+rest"), (64, "masked+rest")}
    blocks = ((128, 128), (64, 64), (128, 32), (64, 16))
    for form, dtype, depth, contents, block, int8 in product(
        *(triton_forward_hopper.FORMS, triton_forward_hopper.DTYPES, (64, 96, 128)),
        *(CONTENTS, blocks, (False, True)),
    ):
        usual = dtype == torch.bfloat16 and block == (128, 128) and (depth, contents) in shipped
        usual = usual and (not int8 or (depth, contents) == (128, "masked+rest"))
        usual = usual or (dtype, depth, contents, block, int8) == (
            *(torch.bfloat16, 128, "plain", (64, 64), False),
        )
        rare = block == (128, 128) or (dtype == torch.bfloat16 and not int8)
        if not usual and not (full and rare):
            continue
        padded, masked = 64 if depth <= 64 else 128, CONTENTS[contents][0]
        try:
            shape = triton_forward_hopper.tiling(
                form, dtype, divmod(arch, 10), *block, padded, masked
            )
        except ValueError:
            continue
        yield forward_case(arch, form, dtype, depth, contents, shape, int8)


def forward_case(
    arch: int,
    form: str,
    dtype: torch.dtype,
    depth: int,
    contents: str,
    shape: Tiling,
    int8: bool = False,
) -> Case:
    """One form of the forward for blocks of 128 queries; int8: of q and k."""
    padded = 64 if depth <= 64 else 128
    masked, rest = CONTENTS[contents]
    value, few = TYPES[dtype], "i8" if int8 else TYPES[dtype]
    arguments = {
        **{"p_q": f"*{few}:16", "p_k": f"*{few}:16", "p_v": f"*{value}:16"},
        "p_out": f"*{value}:16",
        **dict.fromkeys(("p_bias", "p_lse", "p_rest"), "*fp32:16"),
        **dict.fromkeys(("p_q_scale", "p_k_scale", "p_shift"), "*fp32:16"),
        **dict.fromkeys(("p_entry", "p_count", "p_rows"), "*i32:16"),
        **dict.fromkeys(("p_bits", "p_start"), "*i64:16"),
        **strides("q", "batch", "head", "token"),
        **strides("out", "batch", "head", "token"),
        **{"scale": "fp32", "D": depth, "DP": padded, "PARTS": max(1, 128 // shape.block_m)},
        **{"BM": shape.block_m, "BN": shape.block_n, "STAGES": shape.stages},
        **{"MASKED": masked, "REST": rest, "QK8": int8},
    }
    kernel = triton_forward.sparse_forward_kernel
    if form == "pointer":
        arguments |= strides("key", "batch", "head")
    else:
        kernel = triton_forward_hopper.sparse_forward_hopper_kernel
        tile = f"[{shape.block_n},{padded}]"
        arguments |= {"d_k": f"tensordesc<{few}{tile}>", "d_v": f"tensordesc<{value}{tile}>"}
        arguments["SPECIALISED"] = form == "ws"
    name = f"{value} D {depth} {contents} {shape.block_m}x{shape.block_n}"
    return Case(
        kernel,
        arch,
        f"{form} {'int8 QK ' * int8}{name}",
        arguments,
        shape.warps,
        dtype,
        shape.stages if dtype != torch.float32 else 0,
        "float+int8" if int8 else "float",
        shape.registers,
        form == "ws",
    )


def quant_cases(arch: int, full: bool) -> Iterator[Case]:
    for padded, keys in product(HEAD_DIMS, (True, False)):
        if padded != 128 and not full:
            continue
        group = 64 if keys else 128
        arguments = {
            **dict.fromkeys(("p_bias", "p_mean", "p_scale", "p_shift"), "*fp32:16"),
            **{"p_x": "*bf16:16", "p_values": "*i8:16", "p_start": "*i64:16", "p_rows": "*i32:16"},
            **strides("x", "batch", "head", "row"),
            **{"root": "fp32", "D": padded, "DP": padded, "PARTS": 1, "BM": group},
            **{"KEYS": keys, "MEAN": True},
        }
        form = f"bf16 D {padded} {'keys' if keys else 'queries'} {group} rows"
        kernel, warps = triton_quant.quantise_kernel, 8 if group * padded > 8192 else 4
        yield Case(kernel, arch, form, arguments, warps, torch.bfloat16, products="")
    arguments = {
        **{"p_x": "*bf16:16", "p_bias": "*fp32:16", "p_sum": "*fp32:16", "DP": 128},
        **strides("x", "batch", "head"),
        **{"SLAB": triton_quant.SLAB, "STEP": triton_quant.STEP},
    }
    kernel = triton_quant.weighted_sum_kernel
    yield Case(kernel, arch, "bf16 D 128", arguments, 4, torch.bfloat16, products="")


def first_order_cases(arch: int, full: bool) -> Iterator[Case]:
    for dtype in TYPES:
        block_m = triton_forward.first_order_rows(dtype)
        for padded in HEAD_DIMS:
            if not full and (dtype == torch.float16 or padded != 128):
                continue
            arguments = {
                **dict.fromkeys(("p_q", "p_moment", "p_out"), f"*{TYPES[dtype]}:16"),
                **{"p_rest": "*fp32:16", "scale": "fp32", "D": padded, "DP": padded},
                **strides("q", "batch", "head", "token"),
                **strides("out", "batch", "head", "token"),
                **{"BM": block_m, "BK": triton_forward.FIRST_ORDER_STEP},
            }
            form = f"{TYPES[dtype]} D {padded} {block_m} rows"
            yield Case(triton_forward.add_first_order_kernel, arch, form, arguments, 4, dtype)


def list_cases(arch: int, full: bool) -> Iterator[Case]:
    """Appending tiles of one block and of several, masked or not, to the lists of a plan."""
    table = {"p_levels": "*i8:16", "p_entry": "*i32:16", "p_bits": "*i64:16", "p_count": "*i32:16"}
    for pieces, masked in product((1, 2), (False, True)):
        shape = {"PIECES": pieces, "MASKED": masked, "CHUNK": triton_lists.CHUNK}
        if full or (pieces, masked) == (2, True):
            form = f"{pieces} tiles a block{' masked' * masked}"
            kernel = triton_lists.append_whole_kernel
            yield Case(kernel, arch, form, {**table, **shape}, 4, torch.int32, products="")
    for per_tile in (2, 8, 64):
        if full or per_tile == 64:
            shape = {"PER_TILE": per_tile, "TILES": triton_lists.CHUNK // per_tile}
            form = f"{per_tile} blocks a tile"
            kernel = triton_lists.append_shared_kernel
            yield Case(kernel, arch, form, {**table, **shape}, 4, torch.int32, products="")


def select_cases(arch: int, full: bool) -> Iterator[Case]:
    """Selection of one level by rank and of two by mass, in every row width."""
    rules = {"logit": (0, 3), "mass": (0, 3), "rank": (0,)}
    for width, (rule, levels) in product((256, 1024, 2048, 4096, 8192), rules.items()):
        if not full and (rule != "logit" or width == 8192):
            continue
        arguments = {
            **{"p_value": "*fp32:16", "p_forced": "*u1:16", "p_count": "*i64:16"},
            **{"p_level": "*i8:16", "bounds": ("fp32",) * len(levels)},
            **{"LEVELS": levels, "RULE": rule, "NK": width},
        }
        kernel, warps = triton_select.select_kernel, triton_select.warps(width)
        form = f"fp32 {rule} {width} blocks"
        yield Case(kernel, arch, form, arguments, warps, torch.float32, products="")


def stage_cases(arch: int, full: bool) -> Iterator[Case]:
    """Pooling, key buffer, draft scores and first-order moment."""
    table = {"p_start": "*i64:16", "p_count": "*i32:16", "p_order": "*i64:16"}
    for dtype, depth, size in product(TYPES, (64, 80, 128), (16, 64, 128)):
        shipped = dtype == torch.bfloat16 and depth != 80 and size != 16
        if not full and not shipped and (dtype, depth, size) != (torch.float32, 128, 128):
            continue
        value, padded = TYPES[dtype], 64 if depth <= 64 else 128
        low, top = triton_pool.LOW, size.bit_length() - 1
        form = f"{value} D {depth} blocks of {size}"
        arguments = {
            **table,
            **{"p_x": f"*{value}:16", "p_out": "*fp32:16", "D": depth, "DP": padded, "SIZE": size},
            **strides("x", "batch", "head", "token"),
            **{"LOW": low, "HIGH": triton_pool.TILE // low},
        }
        kernel, warps = triton_pool.block_means_kernel, triton_pool.warps(padded)
        yield Case(kernel, arch, form, arguments, warps, dtype, products="")
        kernel = triton_pool.fill_keys_kernel
        arguments["p_out"] = f"*{value}:16"
        arguments |= dict.fromkeys(("first", "end"), ("i32",) * (top + 1))
        for levels, ordered in product((1 | 1 << top, (2 << top) - 1), (False, True)):
            if full or (levels & 2 and not ordered):
                arguments |= {"LEVELS": levels, "TOP": top, "ORDERED": ordered}
                name = f"{form} levels {levels:b}{' ordered' * ordered}"
                yield Case(kernel, arch, name, dict(arguments), warps, dtype, products="")
        shape = triton_taylor.shape_for(dtype, divmod(arch, 10), size)
        arguments = {
            **table,
            **{"p_k": f"*{value}:16", "p_v": f"*{value}:16", "p_video": "*i64:16"},
            **{"p_out": "*fp32:16", "D": depth, "DP": padded, "SIZE": size, "ROWS": shape.rows},
            **strides("k", "batch", "head", "token"),
            **strides("v", "batch", "head", "token"),
            **{"SLAB": triton_taylor.SLAB, "STAGES": shape.stages},
        }
        kernel = triton_taylor.taylor_state_kernel
        yield Case(kernel, arch, form, arguments, shape.warps, dtype)
    for sub, depth in product((1, 2, 4, 8), (64, 80, 128)):
        if not full and (sub not in (1, 4) or depth != 128):
            continue
        tile = triton_draft.tiling(sub)
        arguments = {
            **dict.fromkeys(("p_q", "p_k", "p_out"), "*fp32:16"),
            **dict.fromkeys(("p_q_count", "p_k_count"), "*i32:16"),
            **{"scale": "fp32", "D": depth, "BM": tile.block_m, "BN": tile.block_n},
            **{"BK": triton_draft.STEP, "SUB": sub, "STAGES": tile.stages},
        }
        kernel = triton_draft.draft_scores_kernel
        form = f"fp32 D {depth} {sub} pieces {tile.block_m}x{tile.block_n}"
        yield Case(kernel, arch, form, arguments, tile.warps, torch.float32)


def cases(arch: int, full: bool) -> list[Case]:
    """All compilations for one architecture; full: also the rarer combinations."""
    generators = (
        *(forward_cases, hopper_cases, first_order_cases),
        *(quant_cases, list_cases, select_cases, stage_cases),
    )
    return [case for generator in generators for case in generator(arch, full)]


def strides(tensor: str, *axes: str) -> dict[str, str]:
    return {f"{tensor}_{axis}": "i32:16" for axis in axes}


def inspect(case: Case) -> Found:
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(case.kernel.params):
        value = case.arguments.get(parameter.name, "i32")
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            signature[parameter.name] = value
            continue
        signature[parameter.name], _, divisor = value.partition(":")
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={
            **{"num_warps": case.warps, "enable_fp_fusion": True},
            **({} if case.registers is None else {"maxnreg": case.registers}),
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (dump(flag, cubin.name) for flag in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spills = len(re.findall(r"\b(?:STL|LDL)[. ]", code)) + int(found[2])
    ir = compiled.asm["ttgir"]
    ring = re.findall(
        r"local_alloc\s*:\s*\(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32|i8)", ir
    )
    waits = re.findall(r"async_wait [^{]*\{num = (\d+)", ir)
    return Found(
        int(found[1]),
        spills,
        compiled.metadata.shared,
        len(re.findall(rf"\b(?:{TENSOR_CORE[case.arch]})\b", code)),
        len(re.findall(rf"\b(?:{INTEGER_CORE[case.arch]})\b", code)),
        tuple(map(int, ring)),
        tuple(map(int, waits)),
        any(str(value).startswith("tensordesc") for value in case.arguments.values()),
        "ttg.warp_specialize" in ir,
    )


def dump(flag: str, path: str) -> str:
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    command = [str(TOOLS / "cuobjdump"), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def attempt(arch: int, full: bool, position: int) -> Found | str:
    """What a case gives, or why it does not compile; by position, for a case cannot be pickled."""
    try:
        return inspect(cases(arch, full)[position])
    except Exception as error:
        return f"does not compile: {type(error).__name__} {str(error).strip()[-100:]}"


def table_row(case: Case, found: Found | str) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether a bound is broken."""
    name = case.kernel.__name__.removesuffix("_kernel")
    head = name, case.form, f"sm_{case.arch}", str(case.warps)
    if isinstance(found, str):
        return (*head, *("",) * 5, found), True
    broken = found.breaches(case)
    products = f"{found.tensor_core}" + f"+{found.integer_core}" * (case.products == "float+int8")
    numbers = found.registers, found.spills, f"{found.shared / 1024:.1f}", products
    ring = "/".join(map(str, found.ring)) + " ws" * found.specialised
    return (*head, *map(str, numbers), ring, "; ".join(broken) or "ok"), bool(broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help=f"of {ARCHITECTURES}")
    parser.add_argument(
        "--only", default="", help="a piece of the form's or the kernel's name, such as 'tma bf16'"
    )
    parser.add_argument("--full", action="store_true", help="the rarer combinations too")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if triton_forward.interpreted():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    architectures = [int(arch) for arch in options.arch.split(",")]
    if not set(architectures) <= set(ARCHITECTURES):
        parser.error(f"--arch {options.arch}: allowed are {ARCHITECTURES}")
    columns = ("kernel", "form", "arch", "warps", "regs", "spills", "shared KB", "tensor cores")
    table = Table(*columns, "ring", "verdict", title=f"triton {triton.__version__}")
    broken = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        pending = [
            (case, pool.submit(attempt, arch, options.full, position))
            for arch in architectures
            for position, case in enumerate(cases(arch, options.full))
            if options.only in f"{case.kernel.__name__} {case.form}"
        ]
        if not pending:
            parser.error(f"--only {options.only!r} names no kernel and no form")
        for case, future in pending:
            row, bad = table_row(case, future.result())
            table.add_row(*row)
            broken += bad
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
