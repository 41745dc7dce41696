"""The pair of clips whose figures are known in every convention, and others like it."""

import numpy as np

from vidsparse.quality.frames import write_clip


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


def growing():
    """The first of them against itself with noise of sigma 0, 3, ... 21 in its 8 frames."""
    reference, _ = pair()
    sigma = 3.0 * np.arange(len(reference))[:, None, None, None]
    noise = np.random.default_rng(1).normal(0, 1, reference.shape) * sigma
    return reference, np.clip(reference + noise, 0, 255).astype(np.uint8)


def write_pair(folder):
    """The golden pair on disk, 8 frames a second: (reference, test)."""
    paths = folder / "ref.mkv", folder / "test.mkv"
    for path, clip in zip(paths, pair(), strict=True):
        write_clip(path, clip, 8)
    return paths
