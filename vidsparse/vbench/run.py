"""Runs an installed VBench in its own environment, and says what that environment lacks.

Its Python API is called in a child process that gets its job on stdin: VBench's own command line
joins a shell command, which quotes and $ in a path or prompt break, and hides the exit code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.jobs.layout import slug
from vidsparse.options import made
from vidsparse.quality.frames import atomic_output
from vidsparse.vbench.dimensions import DIMENSIONS
from vidsparse.vbench.export import MANIFEST, PROMPTS, VIDEOS, read_manifest

CHILD = Path(__file__).with_name("child.py")
RESULTS = "_eval_results.json"
READ = (".mp4", ".gif", ".jpg", ".png")
"""What VBench takes for a clip in a folder of custom input."""
SETUP = (
    "VBench needs an environment of its own (numpy < 2, transformers 4.33, Python 3.11 at most): "
    "python3.11 -m venv ENV && ENV/bin/pip install vbench==0.1.5; for temporal_flickering alone "
    "ENV/bin/pip install --no-deps vbench==0.1.5 decord torchvision, with torch numpy "
    "opencv-python-headless tqdm pillow requests"
)


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    python: of VBench's environment. videos: an export, one arm of it, or a folder of clips.
    dimensions: of VBench; none: all that the folder can be judged in. custom: None: as the export
    says, for other folders True. full_info: VBench's list of prompts, None: its own.
    """

    python: Path
    videos: Path
    out: Path
    dimensions: tuple[str, ...] = ()
    device: str = "cuda"
    custom: bool | None = None
    full_info: Path | None = None


@dataclass(frozen=True)
class Task:
    """One call of VBench. prompts: file name -> prompt; empty: read from the file names."""

    name: str
    videos: Path
    prompts: Mapping[str, str]
    custom: bool


def run(request: Request, say: Any = lambda text: None) -> list[Path]:
    """Run all arms; returns the result files. say: told what begins.

    What VBench prints goes to stderr as it comes. Raises ValueError for a user's mistake, and for a
    VBench that cannot be run or fails.
    """
    tasks = list(_tasks(request))
    dimensions = [_dimensions(request, task) for task in tasks]
    python = shutil.which(str(request.python.expanduser()))
    if python is None:
        raise ValueError(f"--python {request.python} is no program that can be run; {SETUP}")
    version = _call(python, {"only_check": True}, request).get("version")
    say(f"VBench {version}, {python}")
    made("--out", request.out)
    return [
        _run(python, task, found, request, say)
        for task, found in zip(tasks, dimensions, strict=True)
    ]


def _tasks(request: Request) -> Iterator[Task]:
    videos = request.videos.expanduser().resolve()
    if not videos.is_dir():
        raise ValueError(f"--videos {request.videos} is no folder")
    if (videos / MANIFEST).is_file():
        manifest, folders = read_manifest(videos / MANIFEST), None
        folders = [videos / arm for arm in manifest["arms"]]
    elif (videos / VIDEOS).is_dir():
        folders = [videos]
        parent = videos.parent / MANIFEST
        manifest = read_manifest(parent) if parent.is_file() else {}
    else:
        yield _task(request, videos.name, videos, {}, request.custom is not False)
        return
    if manifest.get("version") == 2:
        raise ValueError(f"{videos} is an export for VBench-2.0; this runs VBench 0.1.5")
    custom = request.custom
    if custom is None:
        custom = manifest.get("input", "custom") == "custom"
    for folder in folders:
        prompts = _prompts(folder / PROMPTS) if custom else {}
        yield _task(request, folder.name, folder / VIDEOS, prompts, custom)


def _task(
    request: Request, name: str, videos: Path, prompts: Mapping[str, str], custom: bool
) -> Task:
    files = [file for file in videos.iterdir() if file.suffix.lower() in READ]
    others = [file.name for file in videos.iterdir() if file not in files]
    if not files:
        raise ValueError(f"{videos} holds no clip that VBench reads ({', '.join(READ)})")
    if others and not custom:
        raise ValueError(
            f"{videos} holds {sorted(others)[0]}: VBench takes the first file's suffix for that "
            "of all clips; leave the clips alone there"
        )
    if lacking := [file.name for file in files if prompts and file.name not in prompts]:
        raise ValueError(f"{videos.parent / PROMPTS} has no prompt for {lacking[0]}")
    return Task(slug(name) or "clips", videos, prompts, custom)


def _prompts(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{file}: expected file names and their prompts")
    return found


def _dimensions(request: Request, task: Task) -> list[str]:
    allowed = [name for name, one in DIMENSIONS.items() if one.custom or not task.custom]
    for name in request.dimensions:
        if name not in DIMENSIONS:
            raise ValueError(f"--dimension {name}: there are {', '.join(DIMENSIONS)}")
        if name not in allowed:
            raise ValueError(
                f"--dimension {name} needs VBench's own prompts and --standard, or choose of "
                f"{', '.join(allowed)}"
            )
    return list(dict.fromkeys(request.dimensions)) or allowed


def _run(python: str, task: Task, dimensions: Sequence[str], request: Request, say: Any) -> Path:
    say(f"{task.name}: {', '.join(dimensions)}")
    target = request.out / f"{task.name}{RESULTS}"
    with tempfile.TemporaryDirectory(prefix=".vbench-", dir=request.out) as folder:
        job = {
            "videos": str(task.videos),
            "name": task.name,
            "out": folder,
            "dimensions": list(dimensions),
            "mode": "custom_input" if task.custom else "vbench_standard",
            "prompts": dict(task.prompts) or [],
        }
        _call(python, job, request)
        found = Path(folder) / target.name
        if not found.is_file():
            raise ValueError(f"VBench ended without {target.name}; its last lines say why")
        with atomic_output(target) as part:
            part.write_bytes(found.read_bytes())
    return target


def _call(python: str, job: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Run the child to its end; returns what it says of itself."""
    full_info = str(request.full_info.resolve()) if request.full_info else None
    with tempfile.TemporaryDirectory(prefix="vidsparse-") as folder:
        status = Path(folder) / "status.json"
        content = {**job, "status": str(status), "device": request.device, "full_info": full_info}
        sys.stderr.flush()
        try:
            done = subprocess.run(
                [python, str(CHILD)],
                input=json.dumps(content).encode(),
                stdout=2,  # results alone go to stdout
                check=False,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise ValueError(f"--python {python}: {error.strerror}; {SETUP}") from error
        said: dict[str, Any] = json.loads(status.read_text()) if status.is_file() else {}
    if done.returncode:
        raise ValueError(_why(python, done.returncode, said))
    return said


def _why(python: str, code: int, said: Mapping[str, Any]) -> str:
    if missing := said.get("missing"):
        return f"{python} lacks {missing} ({said.get('why') or said.get('failed')}); {SETUP}"
    if broken := said.get("broken"):
        return f"{python} cannot import VBench: {broken}; {SETUP}"
    if failed := said.get("failed"):
        return f"VBench failed: {failed}; its output above says where"
    return f"{python} ended with code {code}, and is no Python that can run VBench; {SETUP}"
