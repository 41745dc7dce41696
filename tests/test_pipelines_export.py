"""Programs made from an accelerated transformer, and forwards that ask for gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import vidsparse
from vidsparse import SparseConfig, TokenGrid
from vidsparse.pipelines.families.wan import ADAPTER
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hoist import Hoist
from vidsparse.pipelines.installation import installation_of

GRADIENTS = r"requires grad: sparse attention is inference only; call it under torch.no_grad\(\)"
TOKEN_TIMES = 10 * torch.arange(72)[None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("timestep", "grad"),
    [(torch.tensor([500]), True), (TOKEN_TIMES, False)],
    ids=["one timestep, with grad", "one for each token, without"],
)
def test_an_exported_forward(timestep: torch.Tensor, grad: bool) -> None:
    pipe, _ = tiny.build("wan")
    model, arguments = pipe.transformer, {**tiny.forward_arguments(), "timestep": timestep}
    stock = tiny.forward(model, timestep=timestep)
    programs = {}
    for name, config in (("dense", tiny.DENSE), ("sparse", tiny.SPARSE)):
        vidsparse.accelerate_pipeline(pipe, config)
        with torch.set_grad_enabled(grad):  # weights require gradients; nothing is computed
            program = torch.export.export(model, args=(), kwargs=arguments).module()
        with vidsparse.step(1, 2):
            eager = tiny.forward(model, timestep=timestep)
        model.forward = lambda program=program, **kwargs: program(**kwargs)
        with vidsparse.step(1, 2):
            programs[name] = tiny.forward(model, timestep=timestep)
        del model.forward
        assert torch.equal(eager, programs[name])
        assert vidsparse.run_report(pipe).steps == 2
    assert float((stock - programs["dense"]).abs().max()) <= 2e-5
    assert float((stock - programs["sparse"]).abs().max()) > 1e-3
    with torch.no_grad(), pytest.raises(RuntimeError, match="or a program exported from it"):
        program(**arguments)
    vidsparse.restore_pipeline(pipe)
    with torch.no_grad(), pytest.raises(RuntimeError, match="undone since"):
        program(**arguments)


def test_exporting_is_no_step_of_a_run() -> None:
    pipe, call = tiny.build("wan", num_layers=1)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    report = vidsparse.run_report(pipe)
    torch.export.export(pipe.transformer, args=(), kwargs=tiny.forward_arguments())
    assert vidsparse.run_report(pipe) is report and len(report.calls) == 8
    assert not any(loop.running for loop in installation_of(pipe.transformer).runs.loops.values())


@pytest.mark.slow
def test_dynamic_sizes_of_an_exported_program() -> None:
    """Batch and text may be dynamic; the video may not, which is said before a program is made."""
    pipe, _ = tiny.build("wan", num_layers=1)
    model, single = pipe.transformer, tiny.forward_arguments()
    tensors = [name for name, value in single.items() if isinstance(value, torch.Tensor)]
    double = {**single, **{name: torch.cat([single[name]] * 2) for name in tensors}}
    stock = [tiny.forward(model, **arguments) for arguments in (single, double)]
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)

    def export(**dynamic: Any) -> Any:
        shapes = {name: dynamic.get(name) for name in double}
        with torch.no_grad():
            return torch.export.export(model, args=(), kwargs=double, dynamic_shapes=shapes)

    for axis, size in ((2, Dim("f", max=9)), (3, 2 * Dim("h", max=16)), (4, Dim.AUTO)):
        with pytest.raises(ValueError, match=r"hidden_states of shape .* only the batch may be dy"):
            export(hidden_states={axis: size})
    batch = {0: Dim("batch", max=4)}
    program = export(**dict.fromkeys(tensors, batch)).module()
    model.forward = lambda **arguments: program(**arguments)
    for arguments, right in zip((single, double), stock, strict=True):
        with vidsparse.step(1, 2):
            assert float((right - tiny.forward(model, **arguments)).abs().max()) <= 2e-5


@pytest.mark.parametrize("axis", range(5))
def test_what_of_the_input_may_be_a_symbol(axis: int) -> None:
    """As above, without exporting."""
    sizes: list[Any] = [2, 16, 3, 8, 12]
    sizes[axis] = ShapeEnv().create_unbacked_symint()
    latents: Any = SimpleNamespace(shape=sizes, ndim=5, device=torch.device("cpu"))
    model, order = tiny.transformer().requires_grad_(False), torch.arange(72)
    hoist = Hoist(model, ADAPTER, lambda grid: (order, order), Forward())
    if axis:
        with pytest.raises(ValueError, match="only the batch may be dynamic"):
            hoist._enter(model, (latents,), {})
    else:
        hoist._enter(model, (latents,), {"timestep": torch.tensor([500])})
    assert (hoist.forward.order is None) == bool(axis)


def test_a_forward_that_asks_for_gradients() -> None:
    """Of weights, of the input, of adapters; refused before anything is computed."""
    pipe, _ = tiny.build("wan")
    model = pipe.transformer
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    ran: list[Any] = []
    model.patch_embedding.register_forward_hook(lambda *args: ran.append(args))
    arguments = tiny.forward_arguments()
    with pytest.raises(ValueError, match=f"transformer or its input {GRADIENTS}"):
        model(**arguments)
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=GRADIENTS):
        model(**arguments)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=GRADIENTS):
        model(**{**arguments, "hidden_states": arguments["hidden_states"].requires_grad_()})
    assert not ran
    with vidsparse.step(1, 2):
        frozen = model(**tiny.forward_arguments())[0]
        assert torch.equal(frozen, tiny.forward(model))
    vidsparse.restore_pipeline(pipe)
    model(**arguments)[0].sum().backward()
    assert arguments["hidden_states"].grad is not None


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_a_single_call_that_asks_for_gradients(density: float) -> None:
    """Dense calls are refused too: whether a call is dense must not decide about training."""
    config = SparseConfig.from_dict(tiny.SPARSE).override(f"schedule.density={density}")
    q = torch.randn(1, 72, 2, 16, requires_grad=True)
    for impl in ("auto", "reference", "cpu"):
        with pytest.raises(ValueError, match=f"q, k or v {GRADIENTS}"):
            vidsparse.sparse_attention(
                q, q, q, grid=TokenGrid(*tiny.GRID), config=config, impl=impl
            )
