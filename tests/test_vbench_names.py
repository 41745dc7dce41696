"""Names of clips as VBench looks for them, its matching written again from its description."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.vbench import names

PROMPTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)


def found_by_standard(prompts, files):
    """VBench 0.1.5: {prompt}-{i}{suffix of the first file}, i below 5 -> prompt of each file."""
    suffix = Path(files[0]).suffix
    looked_for = {f"{prompt}-{i}{suffix}": (prompt, i) for prompt in prompts for i in range(5)}
    return {name: looked_for[name] for name in files if name in looked_for}


def prompt_by_name(name):
    """VBench 0.1.5, custom input: the stem; a hyphen and digits at its end are cut off."""
    stem = Path(name).stem
    head, hyphen, digits = stem.rpartition("-")
    return head if hyphen and digits.isdecimal() else stem


@settings(max_examples=40, deadline=None)
@given(
    st.lists(PROMPTS.filter(lambda p: len(p.encode()) < 240), min_size=1, max_size=8, unique=True)
)
def test_standard_names_are_found_and_tell_their_prompt(prompts):
    files = {names.standard(p, i): (p, i) for p in prompts for i in range(5)}
    assert found_by_standard(prompts, list(files)) == files
    for name, (prompt, index) in files.items():
        assert (names.prompt_of(name), names.index_of(name)) == (prompt, index)
        assert prompt_by_name(name) == prompt


@pytest.mark.parametrize(
    ("name", "prompt", "index"),
    [
        ("it's 3-2-1.mp4", "it's 3-2", 1),
        ("a cat.mp4", "a cat", 0),
        ("a.b-c-12.mp4", "a.b-c", 12),
        ("-7.mp4", "", 7),
        ("a - b.mp4", "a - b", 0),
    ],
)
def test_prompts_and_numbers_are_read_as_vbench_reads_them(name, prompt, index):
    assert (names.prompt_of(name), names.index_of(name)) == (prompt, index)
    assert prompt_by_name(name) == prompt


def test_a_name_has_255_bytes_at_most():
    longest = "é" * 124 + "a"  # 249 bytes, and "-0.mp4"
    assert len(names.standard(longest, 0).encode()) == 255
    with pytest.raises(ValueError, match="256 bytes, a file name at most 255; --custom"):
        names.standard(longest + "a", 0)
    assert len(names.second("x" * 1000, 2)) == 186
    with pytest.raises(ValueError, match="bytes"):
        names.second("é" * 180, 0)


@pytest.mark.parametrize("prompt", ["a/b", "a\0b", "", "\ud800"])
def test_what_no_file_can_be_called_is_refused_with_the_cure(prompt):
    for call in (names.standard, names.second):
        with pytest.raises(ValueError, match="--custom"):
            call(prompt, 0)


def test_custom_names_keep_the_prompt_where_every_file_system_takes_it():
    clips = [("it's $5 `now`", 0), ("a fantasy landscape", 0), ("A fantasy landscape", 0),
             ("a/b", 0), ("a:b", 0), ("x" * 300, 0), (".hidden", 1), ("-rf", 0), ("ab\ncd", 0),
             ("", 0), ("cafe\u0301", 0), ("caf\u00e9", 0)]  # fmt: skip
    found = names.custom(clips)
    assert found[0] == "it's $5 `now`-0.mp4"
    assert all(re.fullmatch(r"[a-z0-9-é]+-[0-9a-f]{12}-[01]\.mp4", n) for n in found[1:]), found
    assert found[1].startswith("a-fantasy-landscape-") and found[9].startswith("video-")
    for n, name in enumerate(found):
        assert names.portable(name) and names.index_of(name) == clips[n][1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=120), st.integers(0, 4)), max_size=8, unique=True))
def test_custom_names_differ_on_every_file_system(clips):
    found = names.custom(clips)
    assert len({names.folded(name) for name in found}) == len(clips)
    assert all(names.portable(name) for name in found)
    assert found == list(reversed(names.custom(clips[::-1])))


def test_one_clip_twice_is_refused():
    with pytest.raises(ValueError, match="two clips would be called 'a-"):
        names.custom([("a", 0), ("a", 0)])
