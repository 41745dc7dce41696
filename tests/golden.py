"""The pair of clips whose figures are known in every convention, and others like it."""

import numpy as np


def pair():
    """Two clips uint8 [8, 120, 208, 3]; the second is the first with Gaussian noise of sigma 6."""
    rng = np.random.default_rng(0)
    frames, height, width = 8, 120, 208
    t = np.arange(frames)[:, None, None, None]
    y = np.arange(height)[None, :, None, None]
    x = np.arange(width)[None, None, :, None]
    c = np.arange(3)
    base = 127 + 80 * np.sin((x + 3 * t) / 17 + c) * np.cos((y - 2 * t) / 23 + c)
    base = base + 25 * np.sin(x * y / 900 + t / 3)
    reference = np.clip(base + rng.normal(0, 6, (frames, height, width, 1)), 0, 255).astype(
        np.uint8
    )
    test = np.clip(reference + rng.normal(0, 6, reference.shape), 0, 255).astype(np.uint8)
    return reference, test
