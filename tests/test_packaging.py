"""The distributions hold what the tree holds, and what they need is what the code imports."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import vidsparse

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INDIRECT = {"ftfy"}
"""Needed by what we call, not imported by us; pyproject.toml says by whom."""
OPTIONAL = {"lpips"}
"""Taken where they are found; `vidsparse compare` says so where they are not."""
LIBRARIES = {"cudnn": "nvidia-cudnn-frontend", "flash_attn": "flash-attn-4"}
"""Modules of the extra "hopper", and the distributions that hold them."""
TOOLS = {"ruff", "mypy", "types-pyyaml", "hatchling", "hatch-fancy-pypi-readme", "pytest-xdist"}
TOOLS |= {"scipy"}
"""Run as programs, or asked for by what is tested."""


def tracked() -> set[str]:
    """Files of the tree, as git knows them; all files where there is no repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and a wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_wheel_holds_the_package_its_presets_and_the_demo_model(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked():
        if name.startswith("vidsparse/"):
            expected.add(name)
        elif name.startswith(("configs/", "assets/demo-wan/", "kernels/results/")):
            expected.add(f"vidsparse/{name}")
    assert held == expected
    assert "vidsparse/py.typed" in held


def test_wheel_runs_without_the_tree_around_it(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import vidsparse; from vidsparse.shipped import demo_model; "
        "print(vidsparse.__file__, demo_model(), *vidsparse.presets())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, model, *presets = done.stdout.split()
    assert Path(package).is_relative_to(tmp_path) and Path(model).is_relative_to(tmp_path)
    assert presets == sorted(p.stem for p in (ROOT / "configs/methods").glob("*.yaml"))


def test_metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == vidsparse.__version__
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) >= {"Repository", "Issues", "Changelog"}
    description = metadata.get_payload()
    targets = re.findall(r"\]\(([^)#][^)]*)\)", description)
    assert targets and all(target.startswith("https://") for target in targets)
    repository = urls["Repository"].removeprefix("https://github.com/")
    assert all(f"/{repository}/" in target for target in targets if "/main/" in target)
    for picture in re.findall(
        r"!\[[^\]]*\]\(https://[^/]+/[^/]+/[^/]+/main/([^)]+)\)", description
    ):
        assert (ROOT / picture).is_file()


def test_sdist_holds_every_file_of_the_tree(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    assert tracked() <= held
    assert held - tracked() <= {"PKG-INFO"}


def test_editable_install_reads_the_tree(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(tmp_path), "-e", str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file() and ".dist-info" not in str(p)]
    links = [p for p in files if p.suffix == ".pth"]
    assert [Path(p.read_text().strip()) for p in links] == [ROOT]
    assert not [p for p in files if p.suffix in (".yaml", ".json", ".safetensors", ".py")]


def imported(folder: str) -> set[str]:
    """Top-level names that the files of a folder import."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def distributions(names: set[str], own: set[str]) -> set[str]:
    """Distributions that provide top-level names of other people's packages, normalised."""
    known = packages_distributions() | {name: [held] for name, held in LIBRARIES.items()}
    foreign = names - set(sys.stdlib_module_names) - own
    return {plain(known[name][0] if name in known else name) for name in foreign}


def plain(requirement: str) -> str:
    return re.split(r"[ ;<>=!\[]", requirement)[0].lower().replace("_", "-")


def test_dependencies_are_those_that_the_package_imports():
    declared = {plain(r) for r in PROJECT["dependencies"]}
    needed = distributions(imported("vidsparse"), {"vidsparse"})
    extras = PROJECT["optional-dependencies"]
    hopper, ray, calibrate = (
        {plain(r) for r in extras[name]} for name in ("hopper", "ray", "calibrate")
    )
    assert hopper == set(LIBRARIES.values())
    assert needed - declared == OPTIONAL | hopper | ray | calibrate
    assert declared - needed == INDIRECT


def test_extras_are_those_that_tests_and_scripts_import():
    files = [p for f in ("tests", "kernels", "pipelines") for p in (ROOT / f).rglob("*.py")]
    own = {"vidsparse", *(p.parent.name if p.stem == "__init__" else p.stem for p in files)}
    base = {plain(r) for r in PROJECT["dependencies"]}
    extras = {name: {plain(r) for r in rs} for name, rs in PROJECT["optional-dependencies"].items()}
    tests = distributions(imported("tests"), own) - base
    assert tests - extras["dev"] == set()
    assert extras["dev"] - tests == TOOLS
    scripts = distributions(imported("kernels") | imported("pipelines"), own) - base
    assert scripts - extras["dev"] - extras["train"] == set()


def test_version_is_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "vidsparse", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"vidsparse {vidsparse.__version__}\n"


def test_completion_knows_the_commands():
    words = {
        "_VIDSPARSE_COMPLETE": "complete_bash",
        "COMP_WORDS": "vidsparse gen",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from vidsparse.cli import main; main()"],
        cwd=ROOT,
        env={**words, "PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["generate"], done.stderr
