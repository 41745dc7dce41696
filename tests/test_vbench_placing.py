"""Where VBench looks for a sample, its matching written again from its code: version 2.0."""

import json
from pathlib import Path

import pytest

from vidsparse.compare.arms import ClipFile
from vidsparse.quality.frames import Clip
from vidsparse.vbench.dimensions import DIVERSITY, SECOND, SECOND_CUSTOM
from vidsparse.vbench.placing import Rules, read_list
from vidsparse.vbench.samples import Sample


def sample(prompt, index):
    clip = Clip(Path(f"{prompt}-{index}.mp4"), 8.0, "h264", False, "")
    return Sample(ClipFile(f"{prompt}-{index}", clip), prompt, index)


def info(folder, dimension):
    file = folder / f"{dimension}.json"
    file.write_text(json.dumps([{"prompt_en": "a", "dimension": [dimension]}]))
    return file


def read_by_second(entries, dimension, names):
    """VBench-2.0, standard input: the clips of a dimension's folder; a missing one stops it."""
    read = []
    for prompt, (own,) in entries:
        if own == dimension:
            read += [f"{prompt[:180]}-{n}.mp4" for n in range(20 if own == "Diversity" else 3)]
    assert set(read) <= set(names)
    return read


def test_every_dimension_of_the_second_layout_has_all_that_it_reads_and_no_more():
    """Prompts of Diversity stand in the list again with other dimensions: 20 samples here, 3 there.

    The names of the dimensions are those of vbench2/__init__.py.
    """
    entries = [("A river changes.", [DIVERSITY]), ("x" * 400, ["Complex_Plot"]),
               ("A river changes.", ["Dynamic_Attribute"]), ("Garden.", [DIVERSITY])]  # fmt: skip
    listed = {p: frozenset(d for q, (d,) in entries if q == p) for p, _ in entries}
    rules = Rules(2, listed=listed)
    samples = [sample("x" * 400, n) for n in range(3)]
    samples += [sample(p, n) for p in ("A river changes.", "Garden.") for n in range(20)]
    placed = rules.place(samples)
    for dimension in SECOND:
        names = [one.name for one in placed if dimension in one.folders]
        assert sorted(read_by_second(entries, dimension, names)) == sorted(names)
    assert list(rules.notes({"fast": placed})) == [
        "fast: prompts of 43 clips are read from file names"
    ]
    notes = list(rules.notes({"fast": placed[:-1]}))
    assert notes[1] == (
        "fast: Diversity has 39 of 40 clips, and VBench-2.0 stops at the first that is missing"
    )
    for late in (sample("x" * 400, 3), sample("Garden.", 20)):
        with pytest.raises(ValueError, match=f"sample number {late.index}, VBench reads 0 to"):
            rules.place([late])


def test_dimensions_of_the_second_version_are_those_that_it_names():
    assert len(SECOND) == len(set(SECOND)) == 18 and set(SECOND_CUSTOM) < set(SECOND)
    groups = {
        "creativity": [DIVERSITY, "Composition"],
        "commonsense": ["Motion_Rationality", "Instance_Preservation"],
        "controllability": ["Dynamic_Spatial_Relationship", "Dynamic_Attribute",
                            "Motion_Order_Understanding", "Human_Interaction", "Complex_Landscape",
                            "Complex_Plot", "Camera_Motion"],
        "human fidelity": ["Human_Anatomy", "Human_Identity", "Human_Clothes"],
        "physics": ["Mechanics", "Thermotics", "Material", "Multi-View_Consistency"],
    }  # fmt: skip
    assert sorted(SECOND) == sorted(name for group in groups.values() for name in group)


def test_the_second_version_takes_clips_of_any_prompt_in_five_dimensions():
    rules = Rules(2, custom=True, dimensions=("Human_Clothes", DIVERSITY))
    last, more = rules.place([sample("Garden.", 19), sample("Garden.", 20)])
    assert (last.folders, more.folders) == (("Human_Clothes", DIVERSITY), ("Human_Clothes",))
    with pytest.raises(ValueError, match="VBench reads 0 to 19"):
        Rules(2, custom=True, dimensions=(DIVERSITY,)).place([sample("Garden.", 20)])
    listed = {"Garden.": frozenset({"Camera_Motion"})}
    for prompt in ("Garden.", "Pool."):
        with pytest.raises(ValueError, match="no dimension that takes clips of any prompt"):
            Rules(2, custom=True, listed=listed).place([sample(prompt, 0)])


def test_the_list_of_one_version_is_refused_for_the_other(tmp_path):
    first = info(tmp_path, "scene")
    assert read_list(first, 1) == {"a": {"scene"}}
    with pytest.raises(ValueError, match="'scene' is no dimension of --version 2"):
        read_list(first, 2)
    with pytest.raises(ValueError, match="'Material' is no dimension of --version 1"):
        read_list(info(tmp_path, "Material"), 1)
