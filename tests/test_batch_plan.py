"""What a batch will make, from prompts, seeds and presets; the command's words about it."""

import json

import pytest
from batch_stub import Stub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from vidsparse import cli
from vidsparse.batch import making
from vidsparse.batch.plan import Batch, make_plan, read_seeds
from vidsparse.generate.job import prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.prompts import WHOLE, Prompt, read_prompts
from vidsparse.generate.request import Request

SIZE = {"height": 32, "width": 32, "frames": 5, "steps": 3}
BASE = Request(device="cpu", **SIZE)
OPTIONS = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "3", "--device", "cpu"]


def plan(out, prompts, base=BASE, presets=("balanced",), seeds=(0,), file="p.jsonl", **options):
    prompts = [Prompt(one) if isinstance(one, str) else one for one in prompts]
    return make_plan(Batch(base, prompts, presets, seeds, out, out / file, **options))


def arms(plan):
    return [(t.folder.parent.name, t.request.prompt, t.request.seed) for t in plan.tasks]


# Plans


def test_every_prompt_seed_and_preset_is_a_job_of_its_own(tmp_path):
    found = plan(
        tmp_path, ["a", "b"], presets=("quality", "fast"), seeds=(0, 3), compare_dense=True
    )
    assert arms(found) == [
        (preset, prompt, seed)
        for prompt in "ab"
        for seed in (0, 3)
        for preset in ("quality", "fast")
    ]
    assert [t.request.compare_dense for t in found.tasks] == [True, False] * 4
    assert {(t.size, t.steps, t.tokens) for t in found.tasks} == {((32, 32, 5), 3, 192)}
    for task in found.tasks:
        job = prepare(task.request)
        assert (job.id, job.out) == (task.id, task.folder)
        assert task.folder.name == prepare(batch_request(task)).out.name


def batch_request(task):
    """What `generate` would be asked for."""
    asked = task.request
    return Request(
        prompt=asked.prompt, seed=asked.seed, preset=asked.preset, device="cpu",
        compare_dense=asked.compare_dense, **SIZE,
    )  # fmt: skip


def test_what_a_line_says_goes_before_the_options(tmp_path):
    lines = [
        Prompt("a", seed=7),
        Prompt("b", width=48, height=64, frames=9),
        Prompt("c", preset="fast"),
        Prompt("d", overrides=("schedule.density=0.5",)),
        Prompt("d", overrides=("schedule.density=0-5",)[:0]),
    ]
    found = plan(tmp_path, lines, seeds=(1, 2))
    first, *rest = found.tasks
    assert (first.request.seed, rest[0].size) == (7, (64, 48, 9))
    names = [name for name, prompt, _ in arms(found) if prompt in "cd"]
    assert names[:2] == ["fast"] * 2 and names[4:] == ["balanced"] * 2
    assert names[2] == names[3] and names[2].startswith("balanced-schedule-density-0-5-")


def test_overrides_that_read_alike_are_two_arms(tmp_path):
    lines = [
        Prompt("a", overrides=(change,)) for change in ("schedule.density=0.5", "kernel.block_q=16")
    ]
    lines.append(Prompt("a", overrides=("schedule.density=.5",)))
    found = plan(tmp_path, lines)
    assert len({task.folder.parent for task in found.tasks}) == 3 - found.twice


def test_what_is_asked_for_twice_is_made_once(tmp_path):
    found = plan(tmp_path, ["a", "b", "a"], seeds=(0, 1))
    assert (len(found.tasks), found.twice) == (4, 2)


FUZZ = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=80)


@FUZZ
@given(st.lists(TEXTS.filter(str.strip), min_size=10, max_size=40))
def test_no_prompt_leads_out_of_the_folder(tmp_path, texts):
    prompts = [p for text in texts for p in (text, f"../../{text}", f"/{text}/..", text * 9)]
    found = plan(tmp_path, prompts)
    for task in found.tasks:
        assert task.folder.parent.parent == tmp_path and ".." not in task.folder.name
        assert task.folder.resolve().is_relative_to(tmp_path.resolve())
    assert len({task.folder.name.casefold() for task in found.tasks}) == len(set(prompts))


def test_presets_from_files_stay_in_the_folder_and_have_names_of_their_own(tmp_path):
    text = prepare(Request(device="cpu", **SIZE)).config.to_yaml()
    for name in ("..yaml", "failures.yaml"):
        (tmp_path / name).write_text(text)
    (task,) = plan(tmp_path, ["a"], presets=(str(tmp_path / "..yaml"),)).tasks
    assert task.folder.parent.parent == tmp_path
    with pytest.raises(InputError, match="the folder failures of a batch is for other files"):
        plan(tmp_path, ["a"], presets=(str(tmp_path / "failures.yaml"),))
    with pytest.raises(InputError, match="expected presets of different names"):
        plan(tmp_path, ["a"], presets=("fast", "x/fast.yaml"))


def test_pinned_conditions_are_part_of_a_job(tmp_path, monkeypatch):
    ids = [plan(tmp_path, ["a"]).tasks[0].id]
    for change in ({"threads": 1}, {"threads": 2}, {"overrides": ("kernel.crossover=1",)}):
        ids.append(plan(tmp_path, ["a"], Request(device="cpu", **SIZE, **change)).tasks[0].id)
    by_option = Request(device="cpu", **SIZE, overrides=("kernel.cpu_route=native",))
    ids.append(plan(tmp_path, ["a"], by_option).tasks[0].id)
    assert len(set(ids)) == 5
    monkeypatch.setenv("VIDSPARSE_CPU_ROUTE", "native")
    assert plan(tmp_path, ["a"]).tasks[0].id == ids[-1]
    monkeypatch.setenv("VIDSPARSE_CPU_ROUTE", "fastest")
    with pytest.raises(InputError, match="VIDSPARSE_CPU_ROUTE='fastest'"):
        plan(tmp_path, ["a"])


def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")
    for line, why in (
        (Prompt("a", height=33, line=2), r"p.jsonl, line 2: --height 33: .* near it: 32, 48"),
        (Prompt("a", preset="fastest", line=3), "line 3: preset 'fastest'"),
        (Prompt("a", overrides=("schedule.density=2",), line=4), "line 4: .*density"),
        (Prompt("a", image="there.png", line=6), "line 6: --image: a WanPipeline takes none"),
    ):
        with pytest.raises(InputError, match=why):
            plan(tmp_path, [Prompt("fine", line=1), line])
    with pytest.raises(InputError, match=r"^--height 33"):
        plan(tmp_path, ["a"], Request(device="cpu", height=33))


def test_images_are_read_before_anything_is_loaded(tmp_path):
    base = Request(device="cpu", pipeline="WanImageToVideoPipeline", **SIZE)
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    lines = [Prompt("a", image=name, line=n) for n, name in enumerate(("red.png", "blue.png"), 1)]
    found = plan(tmp_path, lines, base, seeds=(0, 1))
    assert len({task.id for task in found.tasks}) == 4
    assert found.tasks[0].request.image == str(tmp_path / "red.png")  # beside the file of prompts
    (tmp_path / "red.png").rename(tmp_path / "renamed.png")
    again = plan(tmp_path, [Prompt("a", image="renamed.png")], base)
    assert again.tasks[0].id == found.tasks[0].id
    for name, why in (("red.png", "no such file"), ("text.png", "no image that can be read")):
        with pytest.raises(InputError, match=f"p.jsonl, line 7: --image {tmp_path}/{name}: {why}"):
            plan(tmp_path, [*lines[1:], Prompt("a", image=name, line=7)], base)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("5, 0-1", (5, 0, 1)), ("9-9", (9,))],
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1-", "1,,2", "1.5", "0-3,2", "9" * 19,
                                  "0-100000", "\u0663"])  # fmt: skip
def test_what_are_no_seeds_is_one_line(text):
    with pytest.raises(InputError, match="--seeds") as caught:
        read_seeds(text)
    assert "\n" not in str(caught.value)


# Lines of a file


def test_lines_with_everything(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a", "preset": "fast", "overrides": "x=1", "image": "i.png"}\n'
        '{"prompt": "a", "overrides": ["x=1", "y=2"]}\n'
    )
    first, second = read_prompts(file, "PROMPTS", WHOLE)
    assert first == Prompt("a", preset="fast", overrides=("x=1",), image="i.png")
    assert (second.overrides, second.line) == (("x=1", "y=2"), 2)
    for content, why in (
        ({"preset": 3}, "preset 3: expected text"),
        ({"image": " "}, "image ' ': expected text"),
        ({"overrides": {"x": 1}}, "overrides .*: expected a list"),
        ({"size": "32x32"}, "unknown key 'size'; there are prompt, seed, width, height, frames"),
    ):
        file.write_text(json.dumps({"prompt": "a", **content}))
        with pytest.raises(InputError, match=f"^PROMPTS .*p.jsonl, line 1: {why}"):
            read_prompts(file, "PROMPTS", WHOLE)


# The command


@pytest.fixture
def call(tmp_path, monkeypatch):
    """`vidsparse batch` with a stub in place of the pipeline."""
    stub = Stub(tmp_path / "log")
    monkeypatch.setattr(making, "Pipeline", lambda: stub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\n")

    def run(*arguments, stdin=None):
        words = ["batch", *arguments, *OPTIONS]
        return CliRunner().invoke(cli.app, words, input=stdin, prog_name="vidsparse")

    run.stub = stub
    return run


def test_the_command_makes_all_then_nothing(call):
    arguments = (
        "p.txt",
        "--preset",
        "balanced,fast",
        "--seeds",
        "0-1",
        "--out",
        "o",
        "--compare-dense",
    )
    said = call(*arguments, "--dry-run")
    assert said.exit_code == 0 and not call.stub.begun()
    assert "8 jobs: 0 done, 8 to make, in o/" in said.stderr and "32x32x5" in said.stderr
    said = call(*arguments)
    assert said.exit_code == 0 and len(call.stub.begun()) == 8, said.stderr
    assert "8 jobs: 8 made, 0 were there, 0 failed" in said.stderr and "1.50x" in said.stderr
    assert "vidsparse compare --ref o/balanced --test o/balanced --test o/fast" in said.stderr
    said = call(*arguments, "--json")
    assert said.exit_code == 0 and len(call.stub.begun()) == 8
    content = json.loads(said.stdout)
    assert len(content["jobs"]) == 8 and content["jobs"][0]["status"] == "done"


def test_a_failure_is_exit_code_1_and_named(call):
    call.stub.fails = {0: RuntimeError("it broke")}
    said = call("p.txt", "--out", "o", "--retries", "0")
    assert said.exit_code == 1
    assert said.stderr.count("RuntimeError: it broke") == 4  # as it comes and at the end, two jobs
    assert "o/failures/ has what happened; the same command tries again" in said.stderr


def test_prompts_from_stdin(call):
    assert "2 jobs" in call("-", "--out", "o", "--dry-run", stdin="a\nb\n").stderr
    lines = '{"prompt": "a", "seed": 3}\n{"prompt": "b", "frames": 9}\n'
    assert "32x32x9" in call("-", "--out", "o", "--dry-run", stdin=lines).stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["none.txt"], "PROMPTS none.txt: No such file"),
        ([""], "PROMPTS is empty"),
        (["p.txt", "--engine", "slurm"], "--engine slurm: no such engine; there are local, "),
        (["p.txt", "--workers", "0"], "--workers 0: expected 1 .. 4096"),
        (["p.txt", "--workers", "2"], "--workers 2: --engine local is this process alone"),
        (["p.txt", "--retries", "-1"], "--retries -1: expected 0 .. 100"),
        (["p.txt", "--threads", "0"], "--threads 0: expected 1 .. 1024"),
        (["p.txt", "--gpus-per-worker", "1.5"], "--gpus-per-worker 1.5: expected a share of one"),
        (["p.txt", "--gpus-per-worker", "1"], "--gpus-per-worker: --engine local has none"),
        (["p.txt", "--ray-address", "auto"], "--ray-address: --engine local has none"),
        (["p.txt", "--preset", "fast,"], "--preset 'fast,': expected names"),
        (["p.txt", "--preset", "fast,fast"], "expected presets of different names"),
        (["p.txt", "--preset", "fastest"], "preset 'fastest'"),
        (["p.txt", "--seeds", "x"], "--seeds x: expected whole numbers"),
        (["p.txt", "--set", "schedule.density=3"], "schedule.density"),
        (["p.txt", "--model", "gone.safetensors"], "--model gone.safetensors"),
        (["p.txt", "--engine", "torchrun"], "--engine torchrun: there is no GPU to count"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_code_2(call, arguments, why):
    said = call(*arguments, "--out", "o")
    assert said.exit_code == 2 and not call.stub.begun(), said.stderr
    last = said.stderr.splitlines()[-1]
    assert last.startswith("vidsparse: ") and why in last
