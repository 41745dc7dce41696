"""What is compared: an arm is a set of clips by name, found in a file or a folder.

A folder is one of
    a job's folder (see `vidsparse.jobs.layout`): its dense video for the reference, its sparse one
        for a test arm; lossless before lossy
    a folder of jobs' folders
    a folder of clips: videos, .npz and folders of PNGs, each named by its stem; of one stem the
        lossless file counts
    a folder of PNGs: one clip
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidsparse.jobs.layout import read_sidecar, slug
from vidsparse.quality.frames import Clip, open_clip

VIDEOS = (".mkv", ".mp4", ".avi", ".mov", ".webm", ".m4v", ".gif")
ARRAYS = (".npz",)

ARMS = ("dense", "sparse")
"""What a job's videos are called; the first is its reference."""

Role = Literal["reference", "test"]

DECISIVE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model": lambda job: job["model"].get("fingerprint") or job["model"].get("name"),
    "prompt": lambda job: job["prompt"],
    "negative_prompt": lambda job: job.get("negative_prompt"),
    "seed": lambda job: job["seed"],
    "steps": lambda job: job["steps"],
    "image": lambda job: _input(job, "image"),
    "last_image": lambda job: _input(job, "last_image"),
    "video": lambda job: _input(job, "video"),
    "guidance": lambda job: job.get("guidance"),
    "guidance_2": lambda job: job.get("guidance_2"),
    "height": lambda job: job["height"],
    "width": lambda job: job["width"],
    "frames": lambda job: job["frames"],
    "dtype": lambda job: job.get("dtype"),
    "flow_shift": lambda job: job.get("flow_shift"),
    "gpu": lambda job: job.get("gpu"),
}
"""What two arms must have in common to be compared, as sidecars say it: name -> where it stands."""


def _input(job: Mapping[str, Any], option: str) -> str | None:
    """Hash of a file that a job started from."""
    found: str | None = ((job.get("inputs") or {}).get(option) or {}).get("sha256")
    return found


@dataclass(frozen=True)
class ClipFile:
    """A clip of an arm.

    name: by which clips of other arms find it. sidecar: of the job that made it, or None; arm: of
    the sidecar's arms, "dense" or "sparse". original: of a lossy file that was named itself, the
    lossless clip of the same name beside it, if any.
    """

    name: str
    clip: Clip
    sidecar: Mapping[str, Any] | None = None
    arm: str | None = None
    original: Clip | None = None

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What the clip shows, for alignment by manifest; None without a sidecar."""
        if self.sidecar is None:
            return None
        return tuple(DECISIVE[key](self.sidecar) for key in ("prompt", "seed", "height", "width"))

    def seconds(self) -> float | None:
        """Of the denoising loop that made it, None if nobody says."""
        arms = (self.sidecar or {}).get("arms") or {}
        found = (arms.get(self.arm) or {}).get("denoise_seconds")
        return float(found) if found else None


@dataclass(frozen=True)
class Arm:
    """A reference or a test arm: its clips by name, in the order of their names."""

    name: str
    clips: Mapping[str, ClipFile]


def open_arm(path: Path, role: Role, name: str | None = None) -> Arm:
    """The clips of a file or folder. Raises ValueError that names what is wrong with it."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder")
    found = list(_clips(path, role))
    if not found:
        raise ValueError(
            f"{path} holds no clip: expected videos ({', '.join(VIDEOS)}), .npz, PNGs, or folders "
            "that `vidsparse generate` wrote"
        )
    clips: dict[str, ClipFile] = {}
    for file in sorted(found, key=lambda file: file.name):
        if file.name in clips:
            raise ValueError(
                f"{path} holds two clips named {file.name!r}: {clips[file.name].clip.path.name} "
                f"and {file.clip.path.name}"
            )
        clips[file.name] = file
    return Arm(name or default_name(path, found, role), clips)


def default_name(path: Path, found: Iterable[ClipFile], role: Role) -> str:
    """The preset that all clips were made with, else the name of the path."""
    if role == "reference":
        return "reference"
    presets = {_preset(file) for file in found}
    only = presets.pop() if len(presets) == 1 else None
    return only or path.resolve().stem or "test"


def align(
    reference: Arm, test: Arm, how: Literal["auto", "name", "manifest"] = "auto"
) -> tuple[list[tuple[ClipFile, ClipFile]], list[str]]:
    """Pairs of clips in the order of the reference, and the unmatched ones, as "arm: clip".

    name: equal names. manifest: equal prompt, seed and size, as the sidecars say. auto: one clip
    against one clip whatever they are called, else manifest where all clips have sidecars, else
    name. Raises ValueError if there is no pair, or a sidecar is missing or stands for two clips.
    """
    ours, theirs = list(reference.clips.values()), list(test.clips.values())
    if how == "auto" and len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])], []
    if how == "auto":
        how = "manifest" if all(f.sidecar for f in (*ours, *theirs)) else "name"
    key: Callable[[ClipFile], Any] = _by_name if how == "name" else _by_identity
    keyed = _unique(test.name, theirs, key)
    pairs = [
        (file, keyed[k]) for k, file in _unique(reference.name, ours, key).items() if k in keyed
    ]
    if not pairs:
        names = ", ".join([f.name for f in ours][:3]), ", ".join([f.name for f in theirs][:3])
        raise ValueError(
            f"no clip of {test.name} fits one of the {reference.name} by {how}: "
            f"{names[0]} ... against {names[1]} ..."
        )
    matched = {id(file) for pair in pairs for file in pair}
    rest = [f"{arm.name}: {f.name}" for arm in (reference, test) for f in arm.clips.values()
            if id(f) not in matched]  # fmt: skip
    return pairs, rest


def check_conditions(reference: ClipFile, test: ClipFile, allowed: Iterable[str] = ()) -> None:
    """Raise ValueError that names the first field of `DECISIVE` in which two sidecars differ.

    allowed: fields that may differ. Clips without a sidecar are believed.
    """
    if reference.sidecar is None or test.sidecar is None:
        return
    for field, value in DECISIVE.items():
        ours, theirs = value(reference.sidecar), value(test.sidecar)
        if ours != theirs and field not in set(allowed):
            raise ValueError(
                f"{test.name}: {field} is {theirs!r}, the reference has {ours!r}, so their "
                f"difference would not be the method's; --allow-mismatch {field} compares anyway"
            )


def _clips(path: Path, role: Role) -> Iterable[ClipFile]:
    if path.is_file():
        return [_file(path)]
    if (job := _job_clip(path, role)) is not None:
        return [job]
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    files = [e for e in entries if e.is_file() and e.suffix.lower() in (*VIDEOS, *ARRAYS)]
    folders = [entry for entry in entries if entry.is_dir()]
    found = _of_files(files)
    for folder in folders:
        if (job := _job_clip(folder, role)) is not None:
            found.append(job)
        elif _holds_png(folder):
            found.append(ClipFile(folder.name, open_clip(folder)))
    if not found and _holds_png(path):
        return [ClipFile(path.resolve().name, open_clip(path))]
    return found


def _file(path: Path) -> ClipFile:
    """A file that was named itself, also one of a job's folder."""
    clip = open_clip(path)
    sidecar, original = None, None
    if path.stem in ARMS:
        sidecar = read_sidecar(path.resolve().parent)
    beside = path.with_suffix(".mkv")
    if not clip.lossless and beside != path and beside.is_file():
        found = open_clip(beside)
        original = found if found.lossless else None
    if sidecar is None:
        return ClipFile(path.stem, clip, original=original)
    return ClipFile(_job_name(sidecar), clip, sidecar, path.stem, original)


def _of_files(files: list[Path]) -> list[ClipFile]:
    """A clip per stem: the lossless file of several."""
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file)
    found = []
    for stem, same in by_stem.items():
        clips = sorted((open_clip(file) for file in same), key=lambda clip: not clip.lossless)
        kinds = [clip.lossless for clip in clips]
        if kinds.count(True) > 1 or (kinds.count(True) == 0 and len(kinds) > 1):
            raise ValueError(
                f"{same[0].parent} holds several clips named {stem!r}: "
                f"{', '.join(file.name for file in same)}; leave one"
            )
        found.append(ClipFile(stem, clips[0]))
    return found


def _job_clip(folder: Path, role: Role) -> ClipFile | None:
    """The clip of a job's folder that a role is about; None if it is no such folder."""
    sidecar = read_sidecar(folder)
    if sidecar is None:
        return None
    for arm in ARMS if role == "reference" else reversed(ARMS):
        files = [folder / f"{arm}{suffix}" for suffix in (".mkv", ".mp4")]
        there = [file for file in files if file.is_file()]
        if there:
            return ClipFile(_job_name(sidecar), open_clip(there[0]), sidecar, arm)
    raise ValueError(f"{folder} is the folder of a job, but its videos are gone")


def _job_name(sidecar: Mapping[str, Any]) -> str:
    return f"{slug(str(sidecar['prompt'])) or 'video'}-seed{sidecar['seed']}"


def _holds_png(folder: Path) -> bool:
    return any(file.suffix.lower() == ".png" for file in folder.glob("[!.]*"))


def _preset(file: ClipFile) -> str | None:
    if file.sidecar is None:
        return None
    if file.arm == "dense":
        return "dense"
    preset = file.sidecar["preset"]
    return " ".join([Path(preset["name"]).stem, *preset["overrides"]])


def _by_name(file: ClipFile) -> str:
    return file.name


def _by_identity(file: ClipFile) -> tuple[Any, ...]:
    if file.identity is None:
        raise ValueError(f"{file.clip.path} has no sidecar: align by name")
    return file.identity


def _unique(arm: str, files: list[ClipFile], key: Callable[[ClipFile], Any]) -> dict[Any, ClipFile]:
    keyed: dict[Any, ClipFile] = {}
    for file in files:
        k = key(file)
        if k in keyed:
            raise ValueError(
                f"{arm}: {keyed[k].clip.path} and {file.clip.path} show the same prompt, seed and "
                "size: compare one of them at a time"
            )
        keyed[k] = file
    return keyed
