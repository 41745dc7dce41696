"""SparseConfig: one frozen value that says all of a method; YAML is only a way to write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidsparse import registry
from vidsparse.fields import build, keys
from vidsparse.fields import require as require
from vidsparse.plain_values import (
    an,
    override_list,
    plain,
    read_file,
    read_overrides,
    short,
    stamp,
    write,
)
from vidsparse.refused import refused
from vidsparse.sections import CPU_ROUTES as CPU_ROUTES
from vidsparse.sections import FORMS as FORMS
from vidsparse.sections import Calibrated as Calibrated
from vidsparse.sections import Force as Force
from vidsparse.sections import Keep as Keep
from vidsparse.sections import Kernel as Kernel
from vidsparse.shipped import folder

DEFAULT_METHODS = {
    "layout": "tile",
    "pattern": "none",
    "estimator": "mean",
    "selector": "topk",
    "compensation": "centroid",
    "schedule": "warmup",
}


@dataclass(frozen=True)
class SparseConfig:
    """A method: one `Params` per stage (`vidsparse/<stage>/<name>.py`), forced blocks, kernel.

    Build it with `SparseConfig.load("balanced")`, `SparseConfig.load("my.yaml",
    ["schedule.density=0.2"])` or `SparseConfig.from_dict({...})`; sections that are left out take
    their defaults. Everywhere overrides are `section.key=value` strings, of which the last one of a
    key counts, or one such string. Values stand for themselves: nothing is interpolated.

    Raises ValueError for stages that do not go together: a selector that reads coarser than
    `kernel.block_k` tokens, or needs mass of scores that only rank; scores of clusters that no
    layout makes; forced frames, or a pattern in the video, in an order of heads; patterns of heads
    beside scores; a choice from nothing; what is kept of nothing.
    """

    layout: Any
    pattern: Any
    estimator: Any
    selector: Any
    compensation: Any
    schedule: Any
    force: Force = field(default_factory=Force)
    kernel: Kernel = field(default_factory=Kernel)
    keep: Keep = field(default_factory=Keep)
    calibrated: Calibrated = field(default_factory=Calibrated)
    about: str = ""

    def __post_init__(self) -> None:
        levels, top = tuple(self.selector.levels), self.kernel.block_k.bit_length() - 1
        allowed = f"levels of at most {top} = log2(kernel.block_k)"
        require(max(levels) <= top, "selector.levels", levels, allowed)
        if self.selector.needs_mass and self.estimator.kind == "rank":
            raise ValueError(
                f"selector.name={self.selector.name!r} needs the mass of blocks, and "
                f"estimator.name={self.estimator.name!r} only ranks them: use selector.name=topk, "
                "or estimator.name=mean"
            )
        self._check_clusters()
        of_video = "first_frame", "same_frame", "neighbours", "sinks"
        placed = [name for name in of_video if getattr(self.force, name)]
        if self.layout.per_head and placed:
            raise ValueError(
                f"force.{placed[0]}={getattr(self.force, placed[0])} with layout.name="
                f"{self.layout.name!r}: blocks of an order of heads hold tokens of any frame; use "
                "layout.name=tile"
            )
        self._check_pattern()
        self._check_keep()

    def _check_clusters(self) -> None:
        """Raise ValueError for scores of clusters where a layout makes none."""
        asked = getattr(self.estimator, "of_clusters", False)
        if asked and not getattr(self.layout, "clusters", False):
            raise ValueError(
                f"estimator.name={self.estimator.name!r} with layout.name={self.layout.name!r}, "
                "which makes no clusters: use layout.name=kmeans, or estimator.name=mean"
            )

    def _check_keep(self) -> None:
        """Raise ValueError for what is kept of nothing, or beside what stands for the same."""
        keep = self.keep
        if keep.tail > 1 and self.compensation.name != "none":
            raise ValueError(
                f"keep.tail={keep.tail} with compensation.name={self.compensation.name!r}: both "
                "stand for the blocks that are not listed; use compensation.name=none"
            )
        if keep.residual and not self.schedule.dense_in(50):
            raise ValueError(
                f"keep.residual=True with schedule.name={self.schedule.name!r} and no dense step: "
                "there is nothing to begin from; use schedule.name=warmup and schedule.dense_steps"
            )

    def _check_pattern(self) -> None:
        """Raise ValueError for patterns, and their selector, that the rest does not go with."""
        pattern, static = self.pattern, self.selector.name == "static"
        if self.layout.per_head and pattern.of_video:
            raise ValueError(
                f"pattern.name={pattern.name!r} with layout.name={self.layout.name!r}: blocks of "
                "an order of heads stand nowhere in the video; use layout.name=tile"
            )
        if getattr(pattern, "of_raster", False) and self.layout.name != "raster":
            raise ValueError(
                f"layout.name={self.layout.name!r} with pattern.name={pattern.name!r}, which is "
                "drawn over frames as they stand: use layout.name=raster"
            )
        if getattr(self.layout, "by_pattern", False) and pattern.name == "none":
            raise ValueError(
                f"layout.name={self.layout.name!r} with pattern.name='none': heads choose the "
                "order in which a pattern loses least; use pattern.name=band"
            )
        if static and pattern.name == "none":
            raise ValueError(
                "selector.name='static' with pattern.name='none': there is nothing to keep; "
                f"pattern.name is one of {', '.join(registry.methods('pattern'))}"
            )
        if static and self.schedule.name == "table":
            raise ValueError(
                "selector.name='static' with schedule.name='table': a pattern has one size for all "
                "heads; use selector.name=topk"
            )
        if getattr(pattern, "per_head", False) and not static:
            raise ValueError(
                f"pattern.name={pattern.name!r} with maps of heads beside "
                f"selector.name={self.selector.name!r}: use selector.name=static, or one map"
            )
        if self.estimator.name == "none" and not static:
            raise ValueError(
                f"estimator.name='none' with selector.name={self.selector.name!r}, which asks for "
                "scores: use selector.name=static, or estimator.name=mean"
            )

    @property
    def orders_last(self) -> int:
        """Steps of a run for which heads keep their orders; 0: they have none of their own."""
        return self.layout.refresh if self.layout.per_head else 0

    @classmethod
    def load(
        cls, name_or_path: str | Path, overrides: str | Iterable[str] | None = ()
    ) -> SparseConfig:
        """Preset name (see `presets()`) or path of a YAML file, with overrides.

        Raises ValueError that names the key, the value and what is allowed.
        """
        if not isinstance(name_or_path, str | Path):
            raise TypeError(f"preset is {an(name_or_path)}: expected a preset name or a path")
        return cls._build(_read(name_or_path), override_list(overrides))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], overrides: str | Iterable[str] | None = ()
    ) -> SparseConfig:
        """From nested plain values, for example {"schedule": {"density": 0.2}}.

        Numbers of NumPy and torch count as plain.
        """
        if not isinstance(values, Mapping):
            raise TypeError(
                f"settings are {an(values)}: expected a dict such as "
                '{"schedule": {"density": 0.2}}'
            )
        return cls._build(plain(values, "settings"), override_list(overrides))

    @classmethod
    def _build(cls, values: dict[str, Any], overrides: list[str]) -> SparseConfig:
        """values: plain, fresh."""
        names = [f.name for f in dataclasses.fields(cls)]
        changes = read_overrides(overrides)
        for key in (*values, *changes):
            require(key in names, "section", key, ", ".join(names))
        about = values.get("about")
        about = "" if about is None else about
        require(isinstance(about, str), "about", about, "text; quote a number")
        for words in ("about", "calibrated"):
            require(words not in changes, "section", words, ", ".join(names[:-2]))
        built: dict[str, Any] = {"about": about}
        for stage, default in DEFAULT_METHODS.items():
            base, change = _section(values, stage), _section(changes, stage)
            former = base.get("name", default)
            name = change.get("name", former)
            kind = _params(stage, name)
            if name != former:  # a method keeps of another's settings what it knows
                build(_params(stage, former), stage, base)
                base = {k: v for k, v in base.items() if k in keys(kind) and k != "name"}
            built[stage] = build(kind, stage, base, change)
        if "schedule" in changes:  # other densities than those that were calibrated
            values = {key: value for key, value in values.items() if key != "calibrated"}
        sections = ("force", Force), ("kernel", Kernel), ("keep", Keep), ("calibrated", Calibrated)
        for stage, kind in sections:
            built[stage] = build(kind, stage, _section(values, stage), _section(changes, stage))
        return cls(**built)

    def override(self, *overrides: str) -> SparseConfig:
        """The same config with `section.key=value` strings applied."""
        return self.from_dict(self.to_dict(), overrides)

    def dense_steps(self, steps: int) -> tuple[int, ...]:
        """The steps, 0-based, that the schedule makes dense in all layers of a run of `steps`."""
        require(isinstance(steps, int) and steps >= 1, "steps", steps, "an integer >= 1")
        return tuple(self.schedule.dense_in(steps))

    def dense_note(self, steps: int) -> str:
        """`dense_steps` in words, for displays and reports."""
        dense = self.dense_steps(steps)
        if len(dense) == steps:
            return f"all {steps} steps dense: nothing is sparse, so nothing is faster"
        return f"{len(dense)} of {steps} steps dense"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `from_dict` gives an equal config back."""
        values = dataclasses.asdict(self)
        if self.calibrated == Calibrated():
            del values["calibrated"]
        return values

    @property
    def method(self) -> dict[str, Any]:
        """All of `to_dict` that decides something."""
        values = self.to_dict()
        return {key: value for key, value in values.items() if key not in ("about", "calibrated")}

    def to_yaml(self) -> str:
        """YAML text; loading it gives an equal config."""
        return write(plain(self.to_dict(), "settings"))


def presets() -> dict[str, Path]:
    """Shipped presets: name -> YAML file, sorted by name."""
    return {p.stem: p for p in sorted(folder("configs/methods").glob("*.yaml"))}


def resolve(
    preset: str | Path | Mapping[str, Any] | SparseConfig,
    overrides: str | Iterable[str] | None = (),
) -> SparseConfig:
    """A SparseConfig from whatever users pass: preset name, path, dict or SparseConfig.

    Named ones without overrides are kept, until their file changes.
    """
    changes = override_list(overrides)
    if isinstance(preset, SparseConfig):
        return preset.override(*changes) if changes else preset
    if isinstance(preset, Mapping):
        return SparseConfig.from_dict(preset, changes)
    if isinstance(preset, str | Path):
        return (
            SparseConfig.load(preset, changes)
            if changes
            else _kept(preset, stamp(_path(str(preset))))
        )
    raise TypeError(
        f"preset is {an(preset)}: expected a preset name, a path, a dict or a SparseConfig"
    )


def _read(name_or_path: str | Path) -> dict[str, Any]:
    """The plain values of a preset or a file. Raises ValueError."""
    known, name = presets(), str(name_or_path)
    if name in known:
        return read_file(known[name])
    path = _path(name)
    if why := refused(name):
        raise ValueError(f"preset {short(name)}: {why}")
    if path.suffix not in (".yaml", ".yml") or "\0" in name:
        raise ValueError(
            f"preset {short(name)}: no such preset; there are {', '.join(known)}; "
            "or give the path of a .yaml file"
        )
    return read_file(path)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of a user who does not exist
        return Path(name)


@lru_cache(maxsize=64)
def _kept(name_or_path: str | Path, when: object) -> SparseConfig:
    return SparseConfig.load(name_or_path)


def _section(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    section = values.get(stage)
    if section is None:  # left out, or left empty
        return {}
    require(isinstance(section, dict), stage, section, "a mapping, such as {name: ...}")
    return dict(section)


def _params(stage: str, name: object) -> Any:
    """The dataclass of a method's settings. Raises ValueError for a method that does not exist."""
    if not isinstance(name, str):
        raise ValueError(f"{stage}.name={short(name)}: allowed is the name of a method")
    return registry.method(stage, name).Params
