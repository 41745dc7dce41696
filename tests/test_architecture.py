"""The tree keeps its rules: imports point down, triton in one folder, scripts are no packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vidsparse"

# A room may import rooms further down, and itself only where the table says so.
ROOMS = [
    "__main__",
    "cli",
    "integrations",
    "batch",
    "benching",
    "calibrating",
    "capturing",
    "inspecting",
    "predict",
    "models",
    "generate",
    "vbench",
    "compare",
    "doctor",
    "accelerate",
    "pipelines",
    "drawing",
    "quality",
    "jobs",
    "costs",
    "attention",
    "carried",
    "planning",
    "result",
    "decision",
    "geometry",
    "operands",
    "budgets",
    "layout",
    "pattern",
    "estimator",
    "selector",
    "compensation",
    "schedule",
    "densities",
    "force",
    "head_plans",
    "places",
    "memory",
    "inside",
    "draft",
    "bisection",
    "curves",
    "kernels",
    "config",
    "sections",
    "plan",
    "clusters",
    "blocks",
    "grid",
    "registry",
    "forms",
    "fields",
    "plain_values",
    "shipped",
    "clip_bar",
    "reasons",
    "refused",
    "versions",
    "options",
    "ending",
    "interrupts",
    "terminal",
]
STAGES = ("layout", "pattern", "estimator", "selector", "compensation", "schedule")


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Absolute names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_down(path):
    own = room(name_of(path))
    assert own in ROOMS, f"{path} is in no room: add it to the list in its place"
    for module in imports(path):
        if not module.startswith("vidsparse.") or room(module) == own:
            continue
        if (ROOT / Path(*module.split("."))).with_suffix(".py").exists() or room(module) in ROOMS:
            assert ROOMS.index(room(module)) > ROOMS.index(own), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("stage", STAGES)
def test_methods_never_import_their_siblings(stage):
    for path in (PACKAGE / stage).glob("*.py"):
        names = {m for m in imports(path) if m.startswith(f"vidsparse.{stage}.")}
        siblings = {m for m in names if (PACKAGE / stage / f"{m.split('.')[2]}.py").exists()}
        assert not siblings, f"{path.name} imports {siblings}"


def test_only_kernels_import_triton_and_only_pipelines_import_diffusers():
    for path in modules():
        tops = {m.split(".")[0] for m in imports(path)}
        assert "triton" not in tops or room(name_of(path)) == "kernels", path
        if "diffusers" in tops:
            assert room(name_of(path)) in (
                "pipelines",
                "accelerate",
                "generate",
                "doctor",
                "predict",
            ), path


def test_only_attention_names_the_stages():
    for path in modules():
        used = {room(m) for m in imports(path)} & set(STAGES) - {room(name_of(path))}
        assert not used or name_of(path) == "vidsparse.attention", f"{path} imports {used}"


@pytest.mark.parametrize("folder", ["kernels", "pipelines"])
def test_script_folders_are_no_packages(folder):
    """An importable top-level `kernels` would shadow Hugging Face's package of that name."""
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_stage_contracts_are_short():
    for path in PACKAGE.glob("*/__init__.py"):
        assert len(path.read_text().splitlines()) <= 90, path


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked")
sys.meta_path.insert(0, Block())
import vidsparse
from vidsparse import SparseConfig, TokenGrid, accelerate_pipeline, sparse_attention
import torch
q = torch.randn(1, 2048, 2, 16)
out = sparse_attention(q, q, q, grid=TokenGrid(2, 32, 32), config=SparseConfig.load("balanced"))
assert out.shape == q.shape and out.isfinite().all()
assert "triton" not in sys.modules
print("works")
"""


@pytest.mark.slow
def test_everything_on_the_cpu_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.stdout.strip() == "works", done.stderr


def test_import_vidsparse_is_light():
    code = (
        "import sys, vidsparse; print(sorted({'torch', 'diffusers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
