"""LPIPS, where the package `lpips` and the weights of its backbone are at hand; nothing is fetched.

AlexNet backbone, linear heads of version 0.1, RGB in [-1, 1] (2 x / 255 - 1), float32, mean over
positions, then over frames (Zhang et al. 2018, arXiv 1801.03924). Other projects feed [0, 1] or
take VGG: their figures differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vidsparse.quality.frames import Clip, Frame, iter_frames

BACKBONE = "alexnet-owt-7be5be79.pth"
"""The file that torchvision looks for in torch's hub folder."""


@cache
def lacking() -> str | None:
    """Why LPIPS cannot be taken here, None if it can."""
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch
        return f"the package lpips cannot be imported: {' '.join(str(error).split())}"
    if not _weights().is_file():
        return f"its backbone {BACKBONE} is not in torch's hub folder; torchvision downloads it"
    return None


def lpips(reference: Clip, test: Clip) -> Iterator[float]:
    """LPIPS of every pair of frames, >= 0, less is better."""
    import torch

    model = _model()
    with torch.inference_mode():
        for x, y in zip(iter_frames(reference), iter_frames(test), strict=False):
            yield float(model(_input(x), _input(y)))


def _weights() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE


@cache
def _model() -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _input(frame: Frame) -> Any:
    import torch

    return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
