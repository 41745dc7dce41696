"""Folders of jobs as `publishing` meets and leaves them."""

import json

from vidsparse.jobs.layout import METRICS, SCHEMA


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder, id, text="new", files=("sparse.mp4",)):
    """What a job writes."""
    for name in files:
        (folder / name).write_text(text)
    sidecar = {"schema": SCHEMA, "id": id, "files": [*files, METRICS], "prompt": f"of {id}"}
    (folder / METRICS).write_text(json.dumps(sidecar))


def made(folder, id, text="old", files=("sparse.mp4",)):
    folder.mkdir(parents=True)
    fill(folder, id, text, files)
    return folder
