"""Files of prompts, and many jobs of which finished ones are not computed again."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidsparse.generate import many
from vidsparse.generate.model_files import InputError
from vidsparse.generate.prompts import Prompt, read_prompts, requests, shipped
from vidsparse.generate.request import Request
from vidsparse.jobs.layout import METRICS, SCHEMA

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=30)


def write(folder, text, name="p.txt"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_text_is_a_prompt_a_line(tmp_path):
    text = "\ufeff# two\n\n a red circle \r\n  # no\na \u2028 # b\n"
    found = read_prompts(write(tmp_path, text))
    assert found == [Prompt("a red circle"), Prompt("a \u2028 # b")]


def test_jsonl_has_seed_and_size(tmp_path):
    text = '{"prompt": "a # b", "seed": 3, "width": 96, "height": 64, "frames": 5}\n{"prompt": "c"}'
    file = write(tmp_path, text, "p.JSONL")
    assert read_prompts(file) == [Prompt("a # b", 3, 96, 64, 5), Prompt("c")]


@FUZZ
@given(st.lists(LINES, max_size=8))
def test_every_line_is_kept_or_skipped_by_the_rule(tmp_path, lines):
    stripped = [line.strip() for line in lines]
    wanted = [line for line in stripped if line and not line.startswith("#")]
    file = write(tmp_path, "\n".join(lines))
    if not wanted or wanted[0].startswith("\ufeff") or any(w.startswith("{") for w in wanted):
        return
    assert [one.prompt for one in read_prompts(file)] == [w.lstrip("\ufeff") for w in wanted] or (
        lines[0].startswith("\ufeff")
    )


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(["p.txt", "p.jsonl"]))
def test_any_bytes_are_prompts_or_one_line_with_the_file(tmp_path, content, name):
    file = write(tmp_path, content, name)
    try:
        assert all(one.prompt.strip() for one in read_prompts(file))
    except InputError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.txt", 'a\n{"prompt": "b"}', "line 2: this looks like JSON"),
        ("p.txt", "a\n\nb\x1b[31m", "line 3: the prompt holds the control character"),
        ("p.txt", b"a\nb\xff", "line 2: expected UTF-8"),
        ("p.jsonl", "a red circle", "line 1: expected a JSON object"),
        ("p.jsonl", "\n[1]", "line 2: expected a JSON object"),
        ("p.jsonl", '{"seed": 1}', 'line 1: expected a "prompt" that is text'),
        ("p.jsonl", '{"prompt": " "}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "sead": 1}', "line 1: unknown key 'sead'"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' comes twice"),
        ("p.jsonl", '{"prompt": "a", "seed": NaN}', "line 1: NaN is no value"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed True: expected a whole"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed -1: expected a whole number 0"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', r"expected .* 2\^63 - 1"),
        ("p.jsonl", '{"prompt": "a", "width": 0}', "line 1: width 0: expected a whole number 1"),
        ("p.jsonl", '{"prompt": "a", "frames": 1.5}', "line 1: frames 1.5"),
        ("p.jsonl", '{"prompt": "a", "seed": 1}\n' * 2, "line 2: it is line 1 again"),
        ("p.jsonl", "[" * 100000, "line 1: expected a JSON object, not so many brackets"),
    ],
)
def test_bad_lines_are_named(tmp_path, name, text, why):
    with pytest.raises(InputError, match=why):
        read_prompts(write(tmp_path, text, name))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="none: No such file"):
        read_prompts(tmp_path / "none")


def test_seeds_differ_between_prompts_and_samples():
    lines = [Prompt("a"), Prompt("b", 70, width=32), Prompt("c")]
    found = requests(Request(seed=100, width=64, height=48), lines, samples=2)
    assert [(r.prompt, r.seed) for r in found] == [
        ("a", 100), ("a", 101), ("b", 70), ("b", 71), ("c", 104), ("c", 105),
    ]  # fmt: skip
    assert [(r.width, r.height) for r in found[1:3]] == [(64, 48), (32, 48)]
    with pytest.raises(InputError, match="prompts 1 and 2 are the same with seed 1: 'a'"):
        requests(Request(), [Prompt("a"), Prompt("a", 1)], samples=2)
    with pytest.raises(InputError, match="--samples 0"):
        requests(Request(), lines, samples=0)


def test_the_shipped_sets():
    real, demo = shipped("real"), shipped("demo")
    assert len(set(real)) == 50 and len(set(demo)) == 40
    openings = {" ".join(one.prompt.split()[:3]) for one in real}
    assert len(openings) == 50


SMALL = {"height": 32, "width": 32, "frames": 5, "steps": 2}


def complete(job):
    """Leaves what a finished job leaves, without computing it."""
    job.out.mkdir(parents=True)
    (job.out / "sparse.mkv").touch()
    content = {"schema": SCHEMA, "id": job.id, "files": ["sparse.mkv", METRICS]}
    (job.out / METRICS).write_text(json.dumps(content))
    return {**content, "out": str(job.out)}


@pytest.fixture
def done(monkeypatch):
    """Generating is replaced: a list of what was loaded and computed."""
    calls = []

    def execute(job, listener, pipe):
        calls.append((job.preset, job.seed, job.compare_dense, pipe))
        if len(calls) == 3:  # a load and two jobs
            raise KeyboardInterrupt
        return complete(job)

    monkeypatch.setattr(many, "load", lambda job, listener: calls.append("load") or "pipe")
    monkeypatch.setattr(many, "execute", execute)
    return calls


def jobs_of(out, presets=("balanced", "fast"), **changes):
    found = requests(Request(**{**SMALL, **changes}), [Prompt("a red circle"), Prompt("a ring")])
    made = many.arms(found, presets, out)
    return [job for same in zip(*made.values(), strict=True) for job in same]


def test_finished_jobs_are_not_computed_again(tmp_path, done):
    jobs = jobs_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(many.execute_all(jobs))
    assert done == ["load", ("balanced", 0, True, "pipe"), ("fast", 0, False, "pipe")]
    done[:] = ["x"] * 3
    contents = dict((job.out, content) for job, content in many.execute_all(jobs_of(tmp_path)))
    again = [call[:2] for call in done[4:]]
    assert again == [("fast", 0), ("balanced", 1), ("fast", 1)]
    assert [contents[job.out]["id"] for job in jobs] == [job.id for job in jobs]
    done.clear()
    list(many.execute_all(jobs_of(tmp_path)))
    assert not done, "nothing is loaded when nothing is left to do"


def test_a_job_with_other_facts_or_lost_files_is_computed(tmp_path):
    job = jobs_of(tmp_path)[0]
    assert many.finished(job) is None
    complete(job)
    assert many.finished(job)["id"] == job.id
    other = jobs_of(tmp_path, steps=3)[0]
    assert other.out != job.out and many.finished(other) is None
    (job.out / "sparse.mkv").unlink()
    assert many.finished(job) is None


def test_presets_that_share_a_folder_are_refused(tmp_path):
    for presets in ([], ["fast", "fast"], ["fast", "configs/methods/fast.yaml"]):
        with pytest.raises(InputError, match="expected presets of different names"):
            many.arms([Request(**SMALL, prompt="a")], presets, tmp_path)
