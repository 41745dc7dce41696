"""Compiles the kernels of the exact engines that are libraries, for GPUs that are not here.

    pip install -e ".[hopper]"                     the libraries: wheels, no compiler
    python kernels/aot/engines_gate.py             bfloat16, blocks of 64 and 128
    python kernels/aot/engines_gate.py --full      every dtype and block, an odd head dim
    python kernels/aot/engines_gate.py --require   a missing library is an error
    python kernels/aot/engines_gate.py --arch 90 --only fa4

An engine is asked about every call, and one that it does not refuse is run as on the GPU, on
tensors without memory: the library checks what it is given, chooses its kernel and compiles it;
only the launch is left out, and a library that read a value back would raise. Exit status 1 if a
call is not refused and does not compile, or multiplies without tensor cores. Spills, and products
that each have a fence of their own, are shown: they are the library's. The gate shows neither that
results are right nor how fast they come.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from re import findall
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.GATE)

import torch
from aot_inspect import nvidia_code
from aot_loops import loops_of
from aot_targets import ARCHITECTURES
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from vidsparse import registry
from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.exact import ExactEngine, ExactLists, Question
from vidsparse.kernels.gpu.operands import QueryRows

ENGINES = ("cudnn", "fa4")
ARCHS = ("90", "100", "120")
DEVICE = torch.device("cuda:0")
BATCH, HEADS, TOKENS = 2, 3, 1000
MULTIPROCESSORS, SHARED = 132, 228 * 1024
"""Of a GPU that stands for all: the libraries ask for it."""

COLUMNS = ("engine", "arch", "dtype", "D", "blocks", "kernel", "regs", "spills", "tensor cores",
           "loops", "seconds", "verdict")  # fmt: skip
"""loops: instructions of a turn, of which products, of each loop with products."""


@dataclass(frozen=True)
class Case:
    """Calls of an engine; blocks: of queries and keys, one call each."""

    engine: str
    arch: str
    dtype: torch.dtype
    head_dim: int
    blocks: tuple[tuple[int, int], ...]

    def asked(self, block_q: int, block_k: int) -> Question:
        return Question(DEVICE, self.dtype, self.head_dim, block_q, block_k)


@dataclass(eq=False)
class Kernel:
    """What a library compiled: its class, machine code, seconds; blocks: of the calls that ran it.

    reason: why there is no machine code.
    """

    name: str = ""
    cubin: bytes = b""
    seconds: float = 0.0
    reason: str = ""
    blocks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compiler:
    """Stands before `cutlass.cute.compile`: keeps what it compiles, and launches nothing."""

    real: Any
    compiled: list[Kernel] = field(default_factory=list)
    launched: list[Kernel] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, function: Any, *given: Any, options: str = "", **named: Any) -> Any:
        start = time.perf_counter()
        with TemporaryDirectory() as folder:  # all kernels of a class have the same file name
            options += f" --keep-cubin --dump-dir={folder}"
            made = self.real(function, *given, options=options, **named)
        took = time.perf_counter() - start
        kernel = Kernel(type(function).__name__, made.artifacts.CUBIN, took)
        self.compiled.append(kernel)
        return lambda *_: self.launched.append(kernel)


def main() -> int:
    options, parser = arguments()
    named = options.arch.split(",")
    if unknown := set(named) - set(ARCHS):
        parser.error(f"--arch {', '.join(sorted(unknown))}: allowed are {', '.join(ARCHS)}")
    names = [name for name in ENGINES if options.only in ("", name)]
    absent = {name: why for name in names if (why := lacking(name))}
    for name, why in absent.items():
        print(f"{name}: {why}")
    names = [name for name in names if name not in absent]
    table, good = Table(*COLUMNS), True
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns of addresses of tensors without memory
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(MULTIPROCESSORS)
    for arch in named:
        os.environ["CUTE_DSL_ARCH"] = f"sm_{arch}a"  # read once in a process
        todo = cases(names, arch, options.full)
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for case, kernels in zip(todo, pool.map(compile_case, todo), strict=True):
                for kernel in kernels:
                    cells, fine = table_row(case, kernel)
                    table.add_row(*cells)
                    good &= fine
    if table.row_count:
        table.title = f"nvidia-cutlass-dsl {version('nvidia-cutlass-dsl')}"
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(not good or (options.require and bool(absent)))


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(ARCHS), help=f"of {','.join(ARCHS)}")
    parser.add_argument("--only", default="", choices=("", *ENGINES), help="one engine")
    parser.add_argument("--full", action="store_true", help="the rarer combinations too")
    parser.add_argument("--require", action="store_true", help="a missing library is an error")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args(), parser


def lacking(name: str) -> str | None:
    """Why the library of an engine cannot be used."""
    with gpu((9, 0)):
        why: str | None = registry.engine(name).available(DEVICE)
    return why


def cases(names: list[str], arch: str, full: bool) -> list[Case]:
    """What the engines do not refuse on an architecture."""
    dtypes = (torch.bfloat16, torch.float16) if full else (torch.bfloat16,)
    sizes = support.BLOCK_SIZES if full else (64, 128)
    found = []
    with gpu(ARCHITECTURES[arch].capability):
        for name, dtype, depth in product(names, dtypes, (40, 64, 96, 128) if full else (64, 128)):
            one: ExactEngine = registry.engine(name)
            every = Case(name, arch, dtype, depth, tuple(product(sizes, sizes)))
            if one.available(DEVICE) is None:
                taken = tuple(pair for pair in every.blocks if not one.refuses(every.asked(*pair)))
                found += [Case(name, arch, dtype, depth, taken)] * bool(taken)
    return found


def compile_case(case: Case) -> list[Kernel]:
    """The kernels that the calls of a case launch, each once."""
    dsl, found = import_module("cutlass.cute"), {}
    compiler = Compiler(dsl.compile)
    with gpu(ARCHITECTURES[case.arch].capability), patch.object(dsl, "compile", compiler):
        for pair in case.blocks:
            try:
                call(case.engine, case.asked(*pair))
                kernel = (compiler.launched or compiler.compiled)[-1]
            except Exception as error:
                kernel = Kernel(reason=f"{type(error).__name__} {str(error).strip()[-100:]}")
            kernel.blocks.append("x".join(map(str, pair)))
            found[kernel] = None
    return list(found)


def call(name: str, asked: Question) -> None:
    """Run an engine on a ragged call, tokens before heads in memory, all as it runs on a GPU."""
    engine: ExactEngine = registry.engine(name)
    shape = BATCH, TOKENS, HEADS, asked.head_dim
    lists = BATCH, HEADS, -(-TOKENS // asked.block_q)
    width = TOKENS // asked.block_k * (asked.block_k // engine.tile(asked)) + 1
    with FakeTensorMode():
        q, k, v, out = (
            torch.empty(shape, dtype=asked.dtype, device=DEVICE).transpose(1, 2) for _ in range(4)
        )
        entry, count = (
            torch.empty(size, dtype=torch.int32, device=DEVICE) for size in ((*lists, width), lists)
        )
        lse = torch.empty(q.shape[:3], device=DEVICE)
        start = torch.arange(lists[2], device=DEVICE) * asked.block_q
        rows = QueryRows(start, start.int(), asked.block_q)
        engine.run(q, k, v, ExactLists(entry, count), rows, out, lse, asked)


@contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[None]:
    """A GPU of this capability, as far as engines and libraries ask for it before the launch.

    Some methods of tensors without memory look for a real GPU where the operators behind them do
    not, and so do operators of torch, whose fakes would run no library.
    """
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        put(support, "refusal", lambda device: None)
        put(support, "capability", lambda device: capability)
        put(torch.cuda, "get_device_capability", lambda *_: capability)
        put(torch.cuda, "current_device", lambda: DEVICE.index)
        put(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
        for name in ("device", "device_of"):
            put(torch.cuda, name, lambda *_: nullcontext())
        put(torch.cuda.nvtx, "range", lambda *_: nullcontext())
        put(torch.Tensor, "copy_", lambda x, other: torch.ops.aten.copy_(x, other))
        put(torch.Tensor, "contiguous", contiguous)
        for name in ENGINES:
            module = import_module(f"{registry.ENGINES}.{name}")
            put(module, "attend_operator", module.attend)
        if driver := sys.modules.get("cutlass.base_dsl.runtime.cuda"):
            put(driver, "get_device_attribute", lambda *_: SHARED)
        yield


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """`torch.Tensor.contiguous`."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def table_row(case: Case, kernel: Kernel) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether it is good."""
    arch, dtype = ARCHITECTURES[case.arch], str(case.dtype).removeprefix("torch.")
    head = case.engine, arch.name, dtype, str(case.head_dim), " ".join(kernel.blocks)
    if kernel.reason:
        return (*head, *("",) * 6, f"does not compile: {kernel.reason}"), False
    code = nvidia_code({"cubin": kernel.cubin})
    products = len(findall(rf"\b(?:{arch.products})\b", code.text))
    loops = loops_of(code.text, arch.products)
    verdict = "ok" if products else "no tensor core"
    verdict += "; a fence for each product" * any(loop.serialised for loop in loops)
    numbers = str(code.registers), str(code.spills), str(products)
    turns = " ".join(f"{loop.instructions}/{loop.products}" for loop in loops)
    shown = kernel.name, *numbers, turns, f"{kernel.seconds:.1f}", verdict
    return (*head, *shown), products > 0


if __name__ == "__main__":
    raise SystemExit(main())
