"""SparseConfig: one frozen value that says all of a method; YAML is only a way to write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from vidsparse import registry
from vidsparse.shipped import folder

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise the ValueError of a bad setting: key, value, what is allowed."""
    if not ok:
        raise ValueError(f"{key}={value!r}: allowed is {allowed}")


@dataclass(frozen=True)
class Force:
    """Blocks that are exact whatever their score.

    text: text keys for every query, and every key for text queries. own_block: the keys of the
    query block itself. first_frame: all blocks that hold tokens of frame 0. same_frame: all blocks
    that share a frame with the query block. in_budget: forced blocks count inside the density
    (True) or on top.
    """

    text: bool = True
    own_block: bool = True
    first_frame: bool = False
    same_frame: bool = False
    in_budget: bool = True


FORMS = ("auto", "pointer", "tma", "ws")

LONG_SEQUENCE = 16_384
"""Tokens from which `block_q: auto` means 128."""


@dataclass(frozen=True)
class Kernel:
    """How a plan is executed.

    block_q, block_k: tokens per query / key block, a power of two in 16 .. 512; block_q "auto": 64
        for sequences below 16,384 tokens, of which 128 are a large piece, else 128.
    qk: "native" computes q.k in the input dtype with fp32 sums; "int8" in 8 bits with a scale per
        block, Triton engine only.
    impl: auto | reference | cpu | triton; anything but auto is executed or refused, never replaced.
    form: of the Triton forward kernel, auto | pointer | tma | ws; the last two are for GPUs of
        compute capability 9 and 10.
    cpu_matmul: "auto" lets the CPU engine use the faster fp32 matmul of oneDNN after a precision
        check, "native" forbids it.
    """

    block_q: int | str = "auto"
    block_k: int = 64
    qk: str = "native"
    impl: str = "auto"
    form: str = "auto"
    cpu_matmul: str = "auto"

    def __post_init__(self) -> None:
        sizes = [1 << n for n in range(4, 10)]
        allowed = "a power of two, 16 .. 512"
        ok = self.block_q == "auto" or self.block_q in sizes
        require(ok, "kernel.block_q", self.block_q, f"{allowed}, or auto")
        require(self.block_k in sizes, "kernel.block_k", self.block_k, allowed)
        require(self.qk in ("native", "int8"), "kernel.qk", self.qk, "native, int8")
        require(self.form in FORMS, "kernel.form", self.form, ", ".join(FORMS))
        require(self.impl in IMPLEMENTATIONS, "kernel.impl", self.impl, ", ".join(IMPLEMENTATIONS))
        ok = self.cpu_matmul in ("auto", "native")
        require(ok, "kernel.cpu_matmul", self.cpu_matmul, "auto, native")

    def query_block(self, tokens: int) -> int:
        """Tokens per query block in a sequence of so many tokens."""
        if isinstance(self.block_q, int):
            return self.block_q
        return 64 if tokens < LONG_SEQUENCE else 128


DEFAULT_METHODS = {
    "layout": "tile",
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
    their defaults.
    """

    layout: Any
    estimator: Any
    selector: Any
    compensation: Any
    schedule: Any
    force: Force = field(default_factory=Force)
    kernel: Kernel = field(default_factory=Kernel)
    about: str = ""

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> SparseConfig:
        """Preset name (see `presets()`) or path of a YAML file, with `section.key=value` overrides.

        Raises ValueError that names the key, the value and what is allowed.
        """
        path = Path(name_or_path)
        known = presets()
        if str(name_or_path) in known:
            path = known[str(name_or_path)]
        elif path.suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"preset {str(name_or_path)!r}: no such preset; there are {', '.join(known)}; "
                "or give the path of a .yaml file"
            )
        elif not path.is_file():
            raise ValueError(f"config file {str(path)!r} does not exist")
        try:
            loaded = OmegaConf.load(path)
        except Exception as error:
            raise ValueError(f"config file {str(path)!r} is not valid YAML: {error}") from error
        if not isinstance(loaded, DictConfig):
            raise ValueError(
                f"config file {str(path)!r}: expected sections, found {type(loaded).__name__}"
            )
        return cls._build(loaded, overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = ()) -> SparseConfig:
        """From nested plain values, for example {"schedule": {"density": 0.2}}."""
        return cls._build(OmegaConf.create(dict(values)), overrides)

    @classmethod
    def _build(cls, values: DictConfig, overrides: Iterable[str]) -> SparseConfig:
        overrides = list(overrides)
        for item in overrides:
            require(
                "=" in item and "." in item.split("=")[0], "override", item, "section.key=value"
            )
        try:
            changes = OmegaConf.from_dotlist(overrides)
            merged = cast(DictConfig, OmegaConf.merge(_without_lost_keys(values, changes), changes))
        except OmegaConfBaseException as error:
            raise ValueError(f"overrides {overrides}: {_first_line(error)}") from error
        sections = [f.name for f in dataclasses.fields(cls)]
        for key in merged:
            require(key in sections, "section", key, ", ".join(sections))
        built: dict[str, Any] = {"about": str(merged.get("about") or "")}
        for stage, default in DEFAULT_METHODS.items():
            section = _section(merged, stage)
            name = str(section.get("name", default))
            built[stage] = _structured(stage, registry.method(stage, name).Params, section)
        for stage, kind in (("force", Force), ("kernel", Kernel)):
            built[stage] = _structured(stage, kind, _section(merged, stage))
        return cls(**built)

    def override(self, *overrides: str) -> SparseConfig:
        """The same config with `section.key=value` strings applied."""
        return self.from_dict(self.to_dict(), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """YAML text; loading it gives an equal config."""
        plain = OmegaConf.create(_lists(self.to_dict()))
        return OmegaConf.to_yaml(plain)


def presets() -> dict[str, Path]:
    """Shipped presets: name -> YAML file, sorted by name."""
    return {p.stem: p for p in sorted(folder("configs/methods").glob("*.yaml"))}


def resolve(
    preset: str | Path | Mapping[str, Any] | SparseConfig, overrides: Iterable[str] = ()
) -> SparseConfig:
    """A SparseConfig from whatever users pass: preset name, path, dict or SparseConfig."""
    if isinstance(preset, SparseConfig):
        return preset.override(*overrides)
    if isinstance(preset, Mapping):
        return SparseConfig.from_dict(preset, overrides)
    if isinstance(preset, str | Path):
        return SparseConfig.load(preset, overrides)
    raise TypeError(
        f"preset is a {type(preset).__name__}: "
        "expected a preset name, a path, a dict or a SparseConfig"
    )


def _section(config: DictConfig, stage: str) -> DictConfig:
    section = config.get(stage) or OmegaConf.create({})
    require(isinstance(section, DictConfig), stage, section, "a mapping, such as {name: ...}")
    return section


def _structured(stage: str, kind: type, section: DictConfig) -> Any:
    """Check a section against its dataclass and build it."""
    names = [f.name for f in dataclasses.fields(kind)]
    for key in section:
        require(key in names, f"{stage} key", key, ", ".join(names))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), section))
    except ConfigKeyError as error:
        raise ValueError(f"{stage}: {_first_line(error)}; keys are {', '.join(names)}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        value = section.get(key.split("[")[0]) if key else dict(section)
        raise ValueError(f"{stage}.{key}={value!r}: {_first_line(error)}") from error


def _without_lost_keys(values: DictConfig, changes: DictConfig) -> DictConfig:
    """The base values less the keys that a method named by an override does not know."""
    kept = OmegaConf.to_container(values)
    assert isinstance(kept, dict)
    for stage, default in DEFAULT_METHODS.items():
        change, section = changes.get(stage), kept.get(stage)
        if not isinstance(change, DictConfig) or not isinstance(section, dict):
            continue
        name = change.get("name")
        if name is not None and name != section.get("name", default):
            known = {f.name for f in dataclasses.fields(registry.method(stage, str(name)).Params)}
            kept[stage] = {key: value for key, value in section.items() if key in known}
    return OmegaConf.create(kept)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _lists(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
