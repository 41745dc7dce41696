"""The packages that a script of this folder needs, and the repository root on the path.

Imports nothing beside the standard library; a script imports it first. Missing packages are named
all at once, with the cure, before anything else happens.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

KERNELS = ("torch", "triton")
METHODS = (*KERNELS, "omegaconf", "yaml")
"""Of what reads a `SparseConfig`: a whole call, an estimator, a selector."""

MODELS = (*METHODS, "numpy", "diffusers", "transformers", "accelerate", "huggingface_hub",
          "safetensors", "PIL", "regex", "requests", "filelock")  # fmt: skip
GATE = (*METHODS, "numpy", "rich")
BENCH = ("torch", "numpy", "omegaconf", "yaml", "rich")

DISTRIBUTIONS = {"yaml": "PyYAML", "PIL": "Pillow"}
"""Module -> the distribution that holds it, where the names differ."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64")  # fmt: skip


def missing(modules: Iterable[str]) -> list[str]:
    """Those that cannot be found here; nothing is imported."""
    return [name for name in dict.fromkeys(modules) if not found(name)]


def found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def demand(modules: Sequence[str]) -> None:
    """End the script with exit status 2 if any is missing, naming all."""
    if lacking := missing(modules):
        print(cure({Path(sys.argv[0]).name: lacking}), file=sys.stderr)
        raise SystemExit(2)


def cure(lacking: Mapping[str, Sequence[str]]) -> str:
    """In words: what lacks which modules, and the commands that bring them."""
    every = dict.fromkeys(name for names in lacking.values() for name in names)
    wanted = " ".join(f"'{requirement(name)}'" for name in every)
    lines = [f"missing packages: {', '.join(distribution(name) for name in every)}"]
    lines += [f"  {what} needs {', '.join(map(distribution, names))}"
              for what, names in lacking.items() if names]  # fmt: skip
    lines.append(f"with a network:    {Path(sys.executable).name} -m pip install {wanted}")
    lines.append("without a network: see python kernels/gpu/suite.py --needs")
    return "\n".join(lines)


def distribution(module: str) -> str:
    """The name by which pip knows a module."""
    return DISTRIBUTIONS.get(module, module)


def requirement(module: str) -> str:
    """As pyproject.toml has it, such as "omegaconf>=2.4"; the bare name if it is not there."""
    wanted = normal(distribution(module))
    for line in declared():
        text = line.split(";")[0].strip()
        if normal(bare(text)) == wanted:
            return text
    return distribution(module)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> list[str]:
    """The dependencies of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["train"]]


def report(parts: Mapping[str, Sequence[str]]) -> str:
    """What every part needs, what is missing here, and the two commands for elsewhere.

    Elsewhere nothing but torch is installed: what is missing here need not be missing there.
    """
    lines = [f"python {sys.version.split()[0]}; part: modules (version here)"]
    for part, modules in parts.items():
        beyond = [name for name in modules if name not in KERNELS]
        have = ", ".join(f"{name} ({here(name)})" for name in beyond)
        lines.append(f"  {part}: torch, triton{', ' if have else ''}{have}")
    wheels = beside_torch(name for modules in parts.values() for name in modules)
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    wanted = " ".join(f"'{name}'" for name in wheels)
    lines += [
        "",
        "where nothing but torch is installed. Here, with a network (3.12: the Python there):",
        "  python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 "
        f"--implementation cp --abi cp312 --abi abi3 --abi none {platforms} -d wheels {wanted}",
        "there, without one:",
        "  python3 -m pip install --no-index --no-deps --target site wheels/*.whl && "
        "PYTHONPATH=site python3 kernels/gpu/suite.py",
        "other exact engines: their wheels into the same folder (python -m vidsparse doctor)",
    ]
    return "\n".join(lines)


def beside_torch(modules: Iterable[str]) -> list[str]:
    """Requirements of the distributions that modules need and torch does not bring, at any depth.

    As far as they are installed here: others are for other systems.
    """
    wanted: list[str] = []
    left = [
        distribution(name) for name in dict.fromkeys(modules) if name not in ("torch", "triton")
    ]
    brought = {normal(name) for name in required_at_all("torch")}
    while left:
        name = normal(left.pop(0))
        if name not in brought and name not in wanted:
            wanted.append(name)
            left += required_by(name)
    return [pinned(name) for name in wanted]


def required_at_all(name: str) -> set[str]:
    """A distribution and what it requires, at any depth."""
    found, left = set(), [name]
    while left:
        one = normal(left.pop())
        if one not in found:
            found.add(one)
            left += required_by(one)
    return found


def required_by(name: str) -> list[str]:
    """Names of what a distribution requires without extras, as far as it is installed here."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    names = [bare(line) for line in lines if "extra ==" not in line]
    return [one for one in names if installed(one)]


def installed(name: str) -> str:
    """The version of a distribution, empty if it is not here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def bare(requirement: str) -> str:
    """The name in a requirement."""
    return re.split(r"[<>=!~; \[(]", requirement)[0]


def pinned(name: str) -> str:
    """Name and version as they are here; without a version if it is not here."""
    return f"{name}=={found}" if (found := installed(name)) else name


def here(module: str) -> str:
    """The version that is installed, "missing" if none is."""
    if not found(module):
        return "missing"
    return installed(distribution(module)) or "present"
