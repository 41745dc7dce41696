"""Folders that ship with vidsparse: inside the installed package, beside the package in a clone."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DEMO = "assets/demo-wan"


def folder(name: str) -> Path:
    """A shipped folder, for example "configs/methods" or "assets/demo-wan".

    In an installed package it is `vidsparse/<name>`, in a clone `<root>/<name>`.
    Raises FileNotFoundError that says the cure.
    """
    roots = [PACKAGE]
    if (
        PACKAGE.parent / "pyproject.toml"
    ).is_file():  # else it is site-packages, which others share
        roots.append(PACKAGE.parent)
    for root in roots:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"{name}, which ships with vidsparse, is not in {' or '.join(map(str, roots))}: "
        "reinstall vidsparse, or run it from a clone of its repository"
    )


def demo_model() -> Path:
    """Folder of the demo pipeline. Raises FileNotFoundError that says the cure."""
    path = folder(DEMO)
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"the demo model is not in {path}: restore it from the repository")
    return path
