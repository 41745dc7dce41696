"""What is read off the modules of a transformer is what its forward computes."""

import re

import pytest
import torch
import zoo
from torch import nn

from vidsparse.pipelines.anatomy import Rows, forward_of

WORSE = {
    "hunyuan_video15": (0.1, "it has three texts, and rows of each are counted as the first's"),
    "hunyuan_video15 image": (0.1, "the same"),
    "cosmos frame times": (0.1, "its modulation has a row for each token"),
    "kandinsky6 silent": (0.8, "its layers for audio do not run"),
    "helios": (0.2, "the rows of its history pass no cross-attention"),
    "helios amplified": (0.2, "the same"),
    "motif_video": (0.3, "its single blocks attend twice"),
    "motif_video image": (0.3, "the same"),
}
"""Case -> how far off the count is, and what of its forward the modules do not tell."""


def in_blocks(name):
    """Layers around the blocks are a large share of a tiny model, and hardly one of a real one."""
    return re.search(r"blocks\.\d+\.", name) and "refiner" not in name


def computed(subject):
    """FLOPs of the linear layers in the blocks of a forward, by hooks on all of them."""
    total = 0.0

    def add(module, given, out):
        nonlocal total
        total += 2.0 * given[0].numel() * module.out_features

    handles = [
        module.register_forward_hook(add)
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear) and in_blocks(name)
    ]
    subject.forward()
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("case", zoo.cases(), ids=str)
def test_linear_layers_are_counted_as_they_run(case):
    subject = case.build(batch=1)
    adapter = subject.adapter
    grid = adapter.video(subject.model, subject.arguments)
    found = forward_of(subject.model, adapter, grid, zoo.TEXT, "float32")
    rows = Rows(subject.model, adapter, grid, zoo.TEXT)
    counted = sum(
        2.0 * rows.of(name) * module.in_features * module.out_features
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear) and in_blocks(name)
    )
    ratio = counted / computed(subject)
    assert ratio == pytest.approx(1, abs=WORSE.get(str(case), (0.06,))[0])
    assert (found.heads, found.head_dim) == (case.heads, case.head_dims[0])
    assert found.layers == len(adapter.self_attention(subject.model))
    assert found.weights == sum(w.numel() for w in subject.model.parameters())


def test_the_meta_device_tells_the_same():
    case = next(case for case in zoo.cases() if str(case) == "wan")
    subject = case.build(batch=1)
    adapter, grid = subject.adapter, subject.adapter.video(subject.model, subject.arguments)
    with torch.device("meta"):
        empty = type(subject.model).from_config(subject.model.config)
    real, meta = (forward_of(m, adapter, grid, 16, "float32") for m in (subject.model, empty))
    assert real == meta
