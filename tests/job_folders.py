"""Folders as `vidsparse generate` writes them, without the hours of generating."""

import json
from pathlib import Path

import numpy as np

from vidsparse.jobs.layout import METRICS, REPORT, SCHEMA
from vidsparse.quality.frames import write_clip, write_preview

STEPS, LAYERS, HEADS = 6, 4, 3
DENSE_STEPS = 2


def frames(seed=0, count=12, height=48, width=64, noise=0.0):
    """A moving pattern, uint8 [count, height, width, 3]; noise: sigma in 8-bit steps."""
    t, y, x, c = np.ogrid[:count, :height, :width, :3]
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, 3)
    clip = 127 + 80 * np.sin((x + 2 * t) / 9 + c + phase[0]) * np.cos((y - t) / 11 + phase[1])
    if noise:
        clip = clip + np.random.default_rng(seed + 1).normal(0, noise, clip.shape)
    return np.clip(clip, 0, 255).astype(np.uint8)


def calls(seconds=True):
    """Self-attention calls of a run report, two guidance branches."""
    found = []
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            for layer in range(LAYERS):
                dense = step < DENSE_STEPS
                densities = [
                    1.0 if dense else 0.1 * (1 + head) + 0.01 * layer for head in range(HEADS)
                ]
                spent = {"dense": 0.25} if dense else {"estimate": 0.01, "kernel": 0.05}
                found.append(
                    {
                        "step": step,
                        "layer": layer,
                        "branch": branch,
                        "transformer": "transformer",
                        "density": densities,
                        "reason": "warmup-step" if dense else None,
                        "seconds": spent if seconds else {},
                    }
                )
    return found


def sidecar(prompt, seed, preset, dense, clip, **changes):
    """metrics.json of a job."""
    frames, height, width, _ = clip.shape
    arm = {
        "denoise_seconds": 6.0,
        "total_seconds": 7.0,
        "step_seconds": [1.5, 1.5, 0.75, 0.75, 0.75, 0.75],
    }
    content = {
        "schema": SCHEMA,
        "model": {
            "name": "demo-wan",
            "source": None,
            "fingerprint": "ab" * 16,
            "pipeline": "WanPipeline",
        },
        "prompt": prompt,
        "negative_prompt": "",
        "seed": seed,
        "steps": STEPS,
        "guidance": 4.0,
        "guidance_2": None,
        "height": height,
        "width": width,
        "frames": frames,
        "fps": 8.0,
        "tokens": 6336,
        "dtype": "fp32",
        "device": "cpu",
        "gpu": None,
        "preset": {"name": preset, "overrides": [], "config": {}},
        "arms": {
            "dense": {**arm, "denoise_seconds": 9.0, "step_seconds": [1.5] * STEPS}
            if dense
            else None,
            "sparse": arm,
        },
        "density": 0.215,
        "attention_density": 0.48,
        "files": ["sparse.mkv", METRICS],
    }
    return {**content, **changes}


def write_job(
    folder: Path,
    prompt="a red circle",
    seed=0,
    preset="balanced",
    *,
    noise=4.0,
    dense=True,
    lossless=True,
    preview=False,
    report=True,
    size=(12, 48, 64),
    **changes,
):
    """A job's folder; changes: of the sidecar."""
    folder.mkdir(parents=True)
    reference, test = frames(seed, *size), frames(seed, *size, noise=noise)
    for name, clip in (("dense", reference), ("sparse", test)):
        if name == "dense" and not dense:
            continue
        if lossless:
            write_clip(folder / f"{name}.mkv", clip, 8)
        if preview or not lossless:
            write_preview(folder / f"{name}.mp4", clip, 8)
    if report:
        (folder / REPORT).write_text(json.dumps({"calls": calls()}))
    content = sidecar(prompt, seed, preset, dense, test, **changes)
    (folder / METRICS).write_text(json.dumps(content))
    return folder


def write_presets(folder):
    """Jobs of two prompts with two presets, in balanced/ and fast/ below the folder."""
    for n, prompt in enumerate(("a red circle", "a blue ring")):
        write_job(folder / "balanced" / f"j{n}", prompt, n)
        write_job(folder / "fast" / f"j{n}", prompt, n, "fast", noise=9.0, density=0.1)
    return folder
