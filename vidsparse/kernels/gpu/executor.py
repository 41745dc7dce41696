"""What the house asks about the Triton executor; only `execute` and settings import triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.config import FORMS, Kernel
from vidsparse.kernels import executor
from vidsparse.kernels.executor import Form, KeySummary, Refusal
from vidsparse.kernels.gpu import support
from vidsparse.plan import BlockPlan

if TYPE_CHECKING:  # nothing of it at run time
    from vidsparse.config import SparseConfig

CROSSOVER_DENSITY = 0.7
"""Above this density a call with impl "auto" goes dense on a GPU.

Tiles of Wan 2.1 14B at 720p take 245 ms times the density on an H100, the fastest of torch's dense
attention 198; what is around them took about 20 on an H200: together as fast at 0.73.
"""


class Executor(executor.Executor):
    """Block-sparse attention in Triton."""

    name = "triton"
    about = "Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer, and AMD's gfx942"
    preferred: ClassVar = {"cuda": 0}
    takes_order = True
    executes = support.EXECUTES
    takes: ClassVar = {
        "qk": ("native", "int8"),
        "form": FORMS,
        "engine": ("auto", *registry.engines()),
    }

    def available(self, device: torch.device) -> str | None:
        return support.refusal(device)

    def remark(self, device: torch.device) -> str | None:
        return support.remark(device)

    def refuses(self, form: Form) -> Refusal | None:
        from vidsparse.kernels.gpu import engine  # needs triton, which a CPU need not have

        if refusal := super().refuses(form):
            return refusal
        kernel = form.config.kernel
        code = support.reason(form.device, form.dtype, form.head_dim)
        sizes = self.query_block(form), kernel.block_k
        known = form.dtype or torch.bfloat16, form.head_dim or 64
        levels = max(form.config.selector.levels) > 0
        how = {"levels": levels, "qk": kernel.qk, "form": kernel.form, "engine": kernel.engine}
        try:
            engine.check_settings(form.device, *known, sizes, **how)
        except ValueError as error:
            return Refusal(str(error), code)
        return None

    def crossover(self, form: Form) -> float:
        return CROSSOVER_DENSITY

    def summarise(
        self, k: Tensor, v: Tensor, blocks: Blocks, config: SparseConfig, order: Tensor | None
    ) -> KeySummary | None:
        from vidsparse.kernels.gpu import rest

        compensation = config.compensation
        if not compensation.centroids or k.numel() == 0:
            return None
        made = rest.summary_of(k, v, blocks, order, compensation.first_order)
        return KeySummary(made.draft, made)

    def execute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        kernel: Kernel,
        order: Tensor | None = None,
        return_lse: bool = False,
        summary: KeySummary | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from vidsparse.kernels.gpu import engine

        how: Any = {"form": kernel.form, "qk": kernel.qk, "engine": kernel.engine}
        how["summary"] = None if summary is None else summary.kept
        return engine.execute(q, k, v, plan, order=order, return_lse=return_lse, **how)


EXECUTOR = Executor()
