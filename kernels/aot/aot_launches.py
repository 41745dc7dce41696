"""What the launchers would compile on a GPU that need not be here: they run, the kernels do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import triton
from aot_targets import Architecture
from triton.runtime import driver

from vidsparse.kernels.gpu import support
from vidsparse.plan import BlockPlan

FACTORS = ("exact_tiles", "exact_tiles_hopper", "levels_forward", "rest_merge", "summarise",
           "block_moments", "grams")  # fmt: skip
"""Kernels that multiply matrices of the input's dtype."""

PIPELINED = ("exact_tiles", "exact_tiles_hopper", "levels_forward")
"""Kernels whose loop over tiles of keys is nearly all of a call."""

DRAFTS = ("draft_scores", "draft_spread", "block_errors", "project")
"""Multiply float32 as pairs of tf32."""


@dataclass(frozen=True)
class Launch:
    """The source of a kernel, specialised by its launcher, for one architecture; compiler options.

    source: `triton.compiler.ASTSource`.
    """

    arch: Architecture
    source: Any
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        """Its name without suffix."""
        return str(self.source.fn.__name__).removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the parameters of type constexpr."""
        names = [name for name, kind in self.source.signature.items() if kind == "constexpr"]
        values = {self.source.fn.arg_names[at[0]]: v for at, v in self.source.constants.items()}
        return {name: values[name] for name in names if name in values}

    @property
    def types(self) -> list[str]:
        """Of the elements that its pointers and descriptors lead to."""
        kinds = [kind for kind in self.source.signature.values() if isinstance(kind, str)]
        pointers = [kind[1:] for kind in kinds if kind.startswith("*")]
        return pointers + [k[11 : k.index("[")] for k in kinds if k.startswith("tensordesc<")]

    @property
    def form(self) -> str:
        """Type of the input and constants in words: a flag by its name, if it is set."""
        half = [kind for kind in self.types if kind in ("bf16", "fp16")]
        words = [half[0] if half else self.types[0]]
        for name, value in self.constants.items():
            if value is True:
                words.append(name.lower())
            elif value is not False:
                words.append(f"{name} {str(value).replace(' ', '')}")
        return " ".join(words)

    @property
    def exact(self) -> bool:
        """Whether its products are of float32, which use no tensor cores."""
        return self.kernel in FACTORS and not {"bf16", "fp16"} & set(self.types)

    @property
    def multiplies(self) -> bool:
        """Whether tensor cores must be in use."""
        if self.kernel == "summarise" and not self.constants.get("MOMENT"):
            return False
        return self.kernel in DRAFTS or (self.kernel in FACTORS and not self.exact)

    @property
    def multiplies_int8(self) -> bool:
        """Whether they must multiply integers too."""
        return bool(self.constants.get("QK8"))

    @property
    def limited(self) -> bool:
        """Whether the limit of registers stands for two blocks on one multiprocessor."""
        return (self.options.get("maxnreg") or 255) <= 128

    @property
    def as_sm_80(self) -> bool:
        """Whether the compiler takes the instructions of sm_80: below 64 rows, or int8 long ago."""
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        old = self.arch.name == "sm_100" and self.multiplies_int8 and version < (3, 9)
        return old or self.constants.get("BM", 64) < 64

    @property
    def products(self) -> tuple[str, str]:
        """Instructions of tensor cores, for floats and for int8."""
        if self.as_sm_80 and self.arch.asynchronous:
            return f"{self.arch.products}|HMMA", f"{self.arch.int8_products}|IMMA"
        return self.arch.products, self.arch.int8_products

    @property
    def loops(self) -> int:
        """Over tiles of keys."""
        return 1 + bool(self.constants.get("MASKED") and self.constants.get("SPLIT"))

    @property
    def buffers(self) -> int:
        """That the pipeline of each loop has for keys and for values at least, 0 without one."""
        if self.kernel not in PIPELINED or self.exact:
            return 0
        late = self.as_sm_80 or not self.arch.asynchronous
        return int(self.constants["STAGES"]) - late

    def compile(self) -> Any:
        """The compiled kernel, `triton.compiler.CompiledKernel`."""
        return triton.compile(self.source, target=self.arch.target, options=self.options)


@contextmanager
def recording(arch: Architecture) -> Iterator[list[Launch]]:
    """Launchers believe that the CPU is a GPU of `arch`; each new kernel becomes a `Launch`.

    As on a GPU, a launch that fits a kernel which is there gives no new one. Once per architecture
    and process, as Triton keeps the kernels.
    """
    launches: list[Launch] = []

    def record(source: Any, target: Any = None, options: Any = None, **_: Any) -> Unlaunched:
        launches.append(Launch(arch, source, dict(options)))
        return Unlaunched()

    with (
        patch("triton.compiler.compile", record),
        patch.object(driver, "_active", Machine(arch)),
        patch.object(support, "refusal", lambda device: None),
        patch.object(support, "capability", lambda device: arch.capability),
        patch.object(BlockPlan, "with_orders", with_orders),
        patch.object(
            support, "kernels", lambda name, x: import_module(f"vidsparse.kernels.gpu.{name}")
        ),
    ):
        yield launches


def with_orders(plan: BlockPlan, order_q: Any, order_k: Any) -> BlockPlan:
    """As that of a plan, without a look at numbers that no kernel has written."""
    return replace(plan, order_q=order_q, order_k=order_k)


@dataclass(frozen=True)
class Machine:
    """Stands for Triton's driver; the device number is the architecture's."""

    arch: Architecture

    def get_current_device(self) -> Any:
        return self.arch.target.arch

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.arch.target


class Unlaunched:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        pass
