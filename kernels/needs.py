"""The packages that a script of this folder needs, and the repository root on the path.

Imports nothing beside the standard library; a script imports it first. Missing packages are named
all at once, with the cure, before anything else happens.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

KERNELS = ("torch", "triton", "numpy")
METHODS = (*KERNELS, "omegaconf", "yaml")
"""Of what reads a `SparseConfig`: a whole call, an estimator, a selector."""

MODELS = (*METHODS, "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors",
          "PIL", "regex", "requests", "filelock")  # fmt: skip
USUAL = ("omegaconf", "diffusers")
"""What images with PyTorch, Triton and transformers lack."""

GATE = (*METHODS, "rich")
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
        if normal(re.split(r"[<>=!~ \[]", text)[0]) == wanted:
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

    What is missing here need not be missing there.
    """
    lines = [f"python {sys.version.split()[0]}; part: modules (version here)"]
    for part, modules in parts.items():
        beyond = [name for name in modules if name not in KERNELS]
        have = ", ".join(f"{name} ({here(name)})" for name in beyond)
        lines.append(f"  {part}: torch, triton, numpy{', ' if have else ''}{have}")
    needed = {name for modules in parts.values() for name in modules}
    wheels = [name for name in USUAL if name in needed]
    if not wheels:
        return "\n".join([*lines, "nothing to bring to a machine with these"])
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    wanted = " ".join(f"'{requirement(name)}'" for name in wheels)
    lines += [
        "",
        f"images with torch and transformers lack {' and '.join(wheels)}: add what else --needs",
        "shows as missing there. Here, with a network (3.12: the Python of the other machine):",
        "  python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 "
        f"--implementation cp {platforms} -d wheels {wanted}",
        "there, without one:",
        "  python3 -m pip install --no-index --no-deps --target site wheels/*.whl && "
        "PYTHONPATH=site python3 kernels/gpu/suite.py",
    ]
    return "\n".join(lines)


def here(module: str) -> str:
    """The version that is installed, "missing" if none is."""
    if not found(module):
        return "missing"
    try:
        return version(distribution(module))
    except PackageNotFoundError:
        return "present"
