"""The whole operator on the Triton kernels of every stage, against the reference.

TRITON_INTERPRET=1 pytest tests/test_triton_attention.py
"""

import os
from importlib import import_module
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from vidsparse import SparseConfig, TokenGrid, sparse_attention
from vidsparse.kernels.gpu import support

pytestmark = pytest.mark.interp

GRID = TokenGrid(3, 9, 11, text_tokens=21)
METHODS: dict[str, dict[str, Any]] = {
    "topk-taylor": {"selector": {"name": "topk"}, "compensation": {"name": "taylor"}},
    "topp-centroid": {
        "selector": {"name": "topp", "p": 0.6},
        "compensation": {"name": "centroid"},
        "estimator": {"name": "mean", "sub_blocks": 2},
    },
    "quota-none": {
        "selector": {"name": "pyramid", "levels": [0, 1, 3], "shares": [0.5, 0.25, 0.25]},
        "compensation": {"name": "none"},
        "layout": {"name": "hilbert"},
    },
    "mass-centroid": {
        "selector": {"name": "pyramid", "mode": "mass", "levels": [0, 2], "mass": [0.4, 0.8]},
        "compensation": {"name": "centroid"},
        "estimator": {"name": "mean", "sub_blocks": 4},
        "force": {"first_frame": True},
    },
}
STAGES = {"draft", "means", "select", "work"}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """All stages run in Triton, as on a GPU; the names of their modules as they are asked for."""
    seen: set[str] = set()

    def kernels(name: str, x: torch.Tensor) -> Any:
        seen.add(name)
        return import_module(f"vidsparse.kernels.gpu.{name}")

    monkeypatch.setattr(support, "kernels", kernels)
    return seen


@pytest.mark.parametrize(("name", "batch"), [*zip(METHODS, (1, 1, 2, 1), strict=True)])
def test_every_stage_on_the_device(
    name: str, batch: int, stages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"name": "constant", "density": 0.35, "min_tokens": 0}
    kernel = {"block_q": 32, "block_k": 16}
    config = SparseConfig.from_dict({**METHODS[name], "schedule": schedule, "kernel": kernel})
    q, k, v = (torch.randn(batch, GRID.tokens, 2, 64) for _ in range(3))
    arguments: dict[str, Any] = dict(grid=GRID, config=config, return_lse=True, return_plan=True)
    out, lse, plan = sparse_attention(q, k, v, impl="triton", **arguments)
    assert stages == STAGES
    monkeypatch.setattr(support, "kernels", lambda name, x: None)
    exact = (x.double() for x in (q, k, v))
    want, want_lse, want_plan = sparse_attention(*exact, impl="reference", **arguments)
    assert torch.equal(plan.levels, want_plan.levels)
    assert (out - want).norm() < 3e-6 * want.norm()
    assert (lse - want_lse).abs().max() < 1e-4
    assert out.dtype == q.dtype and torch.equal(plan.density, want_plan.density)


def test_8_bit_products(stages: set[str]) -> None:
    """`kernel.qk=int8` on the same plan: near the native result, and refused by other engines."""
    schedule = {"name": "constant", "density": 0.35, "min_tokens": 0}
    kernel = {"block_q": 64, "block_k": 64, "qk": "int8"}
    config = SparseConfig.from_dict({"schedule": schedule, "kernel": kernel})
    q, k, v = (torch.randn(1, GRID.tokens, 2, 64).bfloat16() for _ in range(3))
    out = sparse_attention(q, k, v, grid=GRID, config=config, impl="triton")
    native = config.override("kernel.qk=native")
    want = sparse_attention(
        q.double(), k.double(), v.double(), grid=GRID, config=native, impl="reference"
    )
    error = float((out - want).norm() / want.norm())
    assert 1e-3 < error < 2e-2
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match=rf"'int8': impl '{impl}'.*native"):
            sparse_attention(q, k, v, grid=GRID, config=config, impl=impl)
