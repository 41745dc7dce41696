"""Is our temporal flickering VBench's? The real VBench 0.1.5 on the same mp4, in its environment.

    python pipelines/vbench_check.py                     synthetic clips
    python pipelines/vbench_check.py --videos FOLDER     clips, or jobs of `vidsparse generate`

Makes the environment once, in build/vbench (PyPI is asked; torch and what else this Python has are
taken from it), exports the clips as custom input, runs VBench on them on the CPU, and prints both
figures of every clip. It averages in float32, we in float64. Exit code 1 if they differ by more
than --tolerance.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from vidsparse.quality.frames import write_clip
from vidsparse.quality.metrics import compare_clips
from vidsparse.vbench.export import Request, export
from vidsparse.vbench.run import Request as RunRequest
from vidsparse.vbench.run import run
from vidsparse.vbench.scores import read_results

ENVIRONMENT = Path(__file__).resolve().parents[1] / "build" / "vbench"
ALONE = ("vbench==0.1.5", "decord", "torchvision==0.28.0")
"""Installed without what they ask for, which one dimension does not need."""
BESIDE = ("numpy", "opencv-python-headless", "tqdm", "pillow", "requests")


def environment(folder: Path) -> Path:
    """Its Python, set up if it is not yet; it sees the packages of this Python after its own."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        (own,) = folder.glob("lib/python3*/site-packages")
        (own / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *BESIDE], check=True)
        subprocess.run([*pip, "--no-deps", *ALONE], check=True)
        ready.touch()
    return python


def synthetic(folder: Path) -> None:
    """Three moving patterns with more or less noise; one has odd sides."""
    for n, (height, width, sigma) in enumerate([(96, 96, 0), (97, 61, 4), (240, 416, 12)]):
        rng = np.random.default_rng(n)
        t, y, x, c = np.ogrid[:21, :height, :width, :3]
        clip = 127 + 80 * np.sin((x + 2 * t) / 9 + c) * np.cos((y - t) / 11)
        clip = clip + rng.normal(0, sigma, clip.shape)
        write_clip(folder / f"it's pattern {n}.mkv", np.clip(clip, 0, 255).astype(np.uint8), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="synthetic clips if left out")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT)
    parser.add_argument("--tolerance", type=float, default=1e-8)
    options = parser.parse_args()
    python = environment(options.environment)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="vidsparse-") as scratch:
        videos, place = options.videos, Path(scratch) / "export"
        if videos is None:
            videos = Path(scratch) / "clips"
            videos.mkdir()
            synthetic(videos)
        manifest = export(Request([(videos, None)], place, custom=True))
        request = RunRequest(python, place, Path(scratch) / "out", ("temporal_flickering",), "cpu")
        judged = 0
        for file in run(request, print):
            found = read_results(file)["temporal_flickering"]
            for path, theirs in found.clips.items():
                ours = compare_clips(path, path).tf_test
                assert ours is not None
                worst = max(worst, abs(ours - theirs))
                judged += 1
                name = Path(path).relative_to(place).as_posix()
                print(f"{name}: VBench {theirs:.12f}, ours {ours:.12f}, {ours - theirs:+.1e}")
    if judged != len(manifest["clips"]):
        sys.exit(f"VBench found {judged} of {len(manifest['clips'])} clips")
    print(f"{judged} clips, at most {worst:.1e} apart")
    if worst > options.tolerance:
        sys.exit(f"more than {options.tolerance:g} apart")


if __name__ == "__main__":
    main()
