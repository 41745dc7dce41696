"""Runs VBench. Executed by the Python of VBench's own environment, so it imports nothing of ours.

Reads a JSON document from stdin: {"status": file to write what went wrong to, "device", "videos",
"name", "out", "dimensions", "mode", "prompts": {file name: prompt} or [], "full_info": file or
null}. With "only_check": true it looks whether VBench can be imported and does no more.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def leave_fakes_out(torch: Any) -> Callable[[], None]:
    """Let torchvision be imported beside a torch that lacks its C operators; returns the undo.

    It registers a fake for each of them, which torch refuses for operators that are not there.
    """
    original = getattr(torch.library, "register_fake", None)
    if original is None:
        return lambda: None

    def register_fake(name: Any, *args: Any, **options: Any) -> Any:
        absent = isinstance(name, str) and name.startswith("torchvision::")
        if absent and not hasattr(torch.ops.torchvision, name.split("::")[1]):
            return lambda function: function
        return original(name, *args, **options)

    torch.library.register_fake = register_fake
    return lambda: setattr(torch.library, "register_fake", original)


def imported() -> Any:
    """The package, and its version."""
    import torch

    undo = leave_fakes_out(torch)
    try:
        vbench = importlib.import_module("vbench")
        importlib.import_module("vbench.utils")  # decord, torchvision
    finally:
        undo()
    from importlib.metadata import PackageNotFoundError, version

    try:
        return vbench, version("vbench")
    except PackageNotFoundError:
        return vbench, "unknown"


def main() -> int:
    job = json.load(sys.stdin)

    def tell(**facts: Any) -> None:
        with open(job["status"], "w", encoding="utf-8") as file:
            json.dump(facts, file)

    try:
        vbench, version = imported()
    except ImportError as error:
        tell(missing=error.name or str(error), why=str(error))
        return 3
    except Exception as error:
        tell(broken="".join(traceback.format_exception_only(type(error), error)).strip())
        return 3
    tell(version=version)
    if job.get("only_check"):
        return 0
    info = job["full_info"] or os.path.join(
        os.path.dirname(vbench.__file__), "VBench_full_info.json"
    )
    try:
        vbench.VBench(job["device"], info, job["out"]).evaluate(
            videos_path=job["videos"],
            name=job["name"],
            prompt_list=job["prompts"],
            dimension_list=job["dimensions"],
            mode=job["mode"],
            local=True,
        )
    except Exception as error:
        traceback.print_exc()
        said = "".join(traceback.format_exception_only(type(error), error)).strip()
        tell(version=version, missing=getattr(error, "name", None), failed=said)
        return 4
    return 0


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # its neighbours are no modules of VBench
    sys.path = [path for path in sys.path if os.path.abspath(path or ".") != here]
    sys.exit(main())
