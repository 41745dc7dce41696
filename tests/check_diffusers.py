"""The tests of families, on the lowest release of diffusers that is allowed and on the newest.

    python tests/check_diffusers.py                   both
    python tests/check_diffusers.py --release lowest  one of them

Each is installed in an environment of its own in .venv-check/, on top of the one that runs this.
Exit status 1 if a test fails, or if `vidsparse.pipelines.private` does not say that the release was
checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-check"
RELEASES = ("lowest", "newest")
FILES = (
    "test_private_names.py",
    "test_families.py",
    "test_family_pipelines.py",
    "test_family_refusals.py",
    "test_family_fused.py",
    "test_family_layer_skip.py",
    "test_family_ltx.py",
    "test_pipelines_interplay.py",
    "test_pipelines_joint.py",
    "test_pipelines_quantised.py",
    "test_pipelines_recognition.py",
    "test_pipelines_restore.py",
    "test_pipelines_steps.py",
    "test_generic_adapter.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--release", choices=RELEASES, nargs="+", default=list(RELEASES))
    failed = [release for release in parser.parse_args().release if not check(release)]
    return 1 if failed else 0


def check(release: str) -> bool:
    """Install a release and run the tests on it; whether all is well."""
    python = environment(FOLDER / release)
    asked = lowest() if release == "lowest" else "diffusers"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "--ignore-installed", "--no-deps", asked], check=True)
    subprocess.run([*pip, "--upgrade-strategy", "only-if-needed", asked], check=True)
    version, checked, lacking = told(python)
    print(f"{release}: diffusers {version}{f', without {lacking}' if lacking else ''}", flush=True)
    if version not in checked:
        print(f"  private.CHECKED is {' .. '.join(checked)}: if all passes, put {version} in")
    files = [str(ROOT / "tests" / name) for name in FILES]
    done = subprocess.run([python, "-m", "pytest", "-n", "2", *files], cwd=ROOT, env=variables())
    return done.returncode == 0 and version in checked


def lowest() -> str:
    """The requirement of the lowest release that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = (line for line in project["dependencies"] if re.match(r"diffusers\W", line))
    return str(found).replace(">=", "==")


def environment(folder: Path) -> str:
    """The Python of a new environment, in which all packages of this one can be imported too."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    below = sysconfig.get_path("purelib")
    line = f"import site; site.addsitedir({below!r})\n"
    (Path(places["purelib"]) / "below.pth").write_text(line, encoding="utf-8")
    return str(Path(places["scripts"]) / "python")


def told(python: str) -> tuple[str, list[str], str]:
    """The version of diffusers there, the checked ones, and the families that it lacks."""
    code = (
        "import diffusers\n"
        "from vidsparse.pipelines import families, private\n"
        "families.by_family()\n"
        "print(diffusers.__version__, *private.CHECKED, sep='\\n')\n"
        "print('; '.join(f'{name} ({why})' for name, why in families.MISSING.items()))\n"
    )
    command = [python, "-c", code]
    done = subprocess.run(
        command, env=variables(), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    version, low, high, lacking = done.stdout.split("\n")[:4]
    return version, [low, high], lacking


def variables() -> dict[str, str]:
    """Of processes that test this tree, wherever the package is installed from."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
