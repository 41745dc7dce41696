"""README.txt of an export: how to run VBench on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST = """\
Clips for VBench 0.1.5, written by `vidsparse vbench export`.

{arms}
With an environment that VBench is installed in:

    vidsparse vbench run --python ENV/bin/python --videos {this} -o RESULTS

or in Python, for one arm (its command line breaks on quotes and $ in paths):

    import json
    from pathlib import Path
    import vbench

    arm = "{first}"
    info = Path(vbench.__file__).with_name("VBench_full_info.json")
    vbench.VBench("cuda", str(info), "RESULTS").evaluate(
        videos_path=f"{{arm}}/videos",
        name=arm,
{arguments}
    )

Then `vidsparse vbench import RESULTS/*_eval_results.json --into COMPARISON`, where COMPARISON is
what `vidsparse compare` has written for the same clips. manifest.json says which clip is which.
"""
CUSTOM = """\
        prompt_list=json.loads(Path(f"{arm}/prompts.json").read_text()),
        dimension_list=["subject_consistency", "temporal_flickering"],
        mode="custom_input",
        local=True,"""
STANDARD = """\
        dimension_list=["subject_consistency", "temporal_flickering"],
        mode="vbench_standard",
        local=True,"""
SECOND = """\
Clips for VBench-2.0, written by `vidsparse vbench export`: a folder per dimension.

{arms}
VBench-2.0 stops at a missing clip; it wants 3 samples of a prompt, of Diversity 20. Give it
<arm>/videos/<dimension> as the folder of the videos. manifest.json says which clip is which.
"""


def readme(manifest: Mapping[str, Any]) -> str:
    """For the content of manifest.json."""
    arms = "".join(f"    {folder}/videos   {name}\n" for folder, name in manifest["arms"].items())
    if manifest["version"] == 2:
        return SECOND.format(arms=arms)
    return FIRST.format(
        arms=arms,
        first=next(iter(manifest["arms"])),
        this=".",
        arguments=CUSTOM if manifest["input"] == "custom" else STANDARD,
    )
