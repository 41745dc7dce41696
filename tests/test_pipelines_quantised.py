"""Quantised linear layers: what they give at density 1 is what they give in the stock model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import zoo
from test_family_grids import DENSE, READING_ALL, READING_FEW
from torch import nn

import vidsparse

BLOCK = 32
"""Weights that share a scale in GGUF: rows of other lengths cannot be quantised."""

Quantise = Callable[[nn.Linear], nn.Module]


def by_torchao() -> Quantise:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantise(linear: nn.Linear) -> nn.Module:
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
        return linear

    return quantise


def by_gguf() -> Quantise:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def quantise(linear: nn.Linear) -> nn.Module:
        kind, has_bias = gguf.GGMLQuantizationType.Q8_0, linear.bias is not None
        weight = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
        new = GGUFLinear(linear.in_features, linear.out_features, has_bias, torch.float32)
        new.weight = GGUFParameter(torch.from_numpy(weight), quant_type=kind)
        new.bias = linear.bias
        return new

    return quantise


def by_bitsandbytes(bits: int) -> Quantise:
    modules = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn

    def quantise(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        if bits == 8:
            new = modules.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            new = modules.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")  # quantises

    return quantise


KINDS: dict[str, Callable[[], Quantise]] = {
    "torchao int8": by_torchao,
    "gguf Q8_0": by_gguf,
    "bitsandbytes int8": lambda: by_bitsandbytes(8),
    "bitsandbytes nf4": lambda: by_bitsandbytes(4),
}
CASES = {case.name: case for case in zoo.cases()}


def replace_linears(model: nn.Module, quantise: Quantise) -> int:
    """Those that diffusers would quantise; how many they are."""
    spared = getattr(model, "_keep_in_fp32_modules", None) or []
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % BLOCK == 0
        and not any(part in spared for part in name.split("."))
    ]
    for name, linear in linears:
        model.set_submodule(name, quantise(linear.requires_grad_(False)))
    return len(linears)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_linears(kind: str, name: str) -> None:
    quantise = KINDS[kind]()
    subject = CASES[name].build()
    plain = subject.forward()
    assert replace_linears(subject.model, quantise) > 4 * len(
        subject.adapter.self_attention(subject.model)
    )
    stock = subject.forward()
    assert float((plain - stock).abs().max()) > 1e-3, "they are not quantised"
    for config, low, high in (
        (DENSE, 0, 2e-5),
        (READING_ALL, 0, 2e-5),
        (READING_FEW, 1e-3, math.inf),
    ):
        vidsparse.accelerate_pipeline(subject.pipe, config)
        with vidsparse.step(1, 2):
            assert low <= float((stock - subject.forward()).abs().max()) < high
    assert vidsparse.run_report(subject.pipe).dense_reasons == {}
    vidsparse.restore_pipeline(subject.pipe)
    assert torch.equal(stock, subject.forward())
