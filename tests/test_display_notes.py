"""What a person sees of a run: notes not to overlook, lines on the way, figures in their places."""

import copy
import io

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vidsparse.generate import run as runs
from vidsparse.generate.display import Display, notes, summary
from vidsparse.generate.request import Request
from vidsparse.reasons import REASONS

METHOD = ("schedule.min_tokens=0", "schedule.dense_layers=[]", "kernel.block_q=16")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What `generate` returns for a comparison on a tiny pipeline."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    size = {"height": 32, "width": 32, "frames": 1, "steps": 2}
    with tiny.one_thread():
        return runs.generate(
            Request(str(path), "a monkey", overrides=METHOD, compare_dense=True, **size),
        )


def timed(content, threads, seconds, dense, sparse, device="cpu"):
    """The content of a run whose arms took CPU time as given, each in `seconds` of a loop."""
    made = copy.deepcopy(content)
    made |= {"threads": threads, "device": device, "sparse_calls": 1}
    for name, cpu in (("dense", dense), ("sparse", sparse)):
        made["arms"][name] |= {"denoise_seconds": seconds, "cpu_seconds": cpu}
    return made


@given(
    threads=st.integers(1, 64),
    seconds=st.sampled_from([0.5, 2.0, 300.0]),
    shares=st.tuples(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), st.sampled_from([0.25, 0.5, 1])),
)
@settings(max_examples=60, deadline=None)
def test_a_run_that_got_less_than_half_of_its_threads_is_noted(content, threads, seconds, shares):
    dense, sparse = (share * seconds * threads for share in shares)
    found = notes(timed(content, threads, seconds, dense, sparse))
    if min(shares) >= 0.5:
        assert found == []
    else:
        (note,) = found
        assert f"{100 * min(shares):.0f}% of {threads} CPU threads" in note and "note: " in note
    assert notes(timed(content, threads, seconds, dense, sparse, device="cuda")) == []


def test_the_only_arm_of_a_run_is_watched_too(content):
    alone = timed(content, 2, 10.0, 0, 9.0)
    alone["arms"]["dense"] = None
    (note,) = notes(alone)
    assert "45% of 2" in note
    alone["arms"]["sparse"]["cpu_seconds"] = 11.0
    assert notes(alone) == []


def test_a_run_without_a_sparse_call_says_why_in_words(content):
    quiet = timed(content, 1, 1.0, 1.0, 1.0)
    assert notes(quiet) == []
    quiet |= {"sparse_calls": 0, "dense_reasons": {"too-short": 7, "warmup-step": 1}}
    (note,) = notes(quiet)
    assert "nothing was sparse" in note
    assert REASONS["too-short"] in note and REASONS["warmup-step"] in note
    assert notes({**quiet, "sparse_calls": 1}) == []


def shown(printable, width=200):
    stream = io.StringIO()
    Console(file=stream, width=width).print(printable)
    return stream.getvalue()


def test_the_table_has_every_figure_in_its_row_and_column(content):
    made = copy.deepcopy(content)
    figures = ("denoise_seconds", "median_step_seconds", "cpu_seconds", "total_seconds")
    for at, name in enumerate(("dense", "sparse")):
        made["arms"][name] |= {key: 10 * at + n + 0.126 for n, key in enumerate(figures)}
    gains = ("denoise", "median_step", "cpu", "total")
    made["speedup"] |= {key: 1.5 + n for n, key in enumerate(gains)}
    made["limit"] = None
    made |= {"density": 0.3712, "attention_density": 0.6289, "device": "cpu"}
    made["quality"] |= {"psnr_pool": 31.4159, "ssim": 0.98765432}
    rows = [line.split() for line in shown(summary(made)).splitlines() if line.strip()]
    assert rows[0] == ["dense", "sparse"]
    titles = ("denoising", "median step", "CPU time", "whole pipeline")
    for n, (title, row) in enumerate(zip(titles, rows[1:5], strict=True)):
        wanted = f"{title} {n + 0.13:.2f} s {n + 10.13:.2f} s {n + 1.5:.2f}x as fast"
        assert row == wanted.split()
    assert rows[5][:4] == ["density", "1.00", "0.37", "0.63"]
    assert rows[6][:3] == ["PSNR", "31.42", "dB"] and rows[7][:2] == ["SSIM", "0.9877"]

    made["limit"] = {"share": 0.678, "speedup": 1.724}
    row = next(line for line in shown(summary(made)).splitlines() if line.startswith("at most"))
    assert row.strip().endswith("1.72x: 68% of it is sparse attention")
    made["quality"]["psnr_pool"] = None
    assert "PSNR identical" in " ".join(shown(summary(made)).split())
    made |= {"device": "cuda:0", "quality": None, "speedup": None, "limit": None}
    made["arms"]["dense"] = None
    rows = [line.split() for line in shown(summary(made)).splitlines() if line.strip()]
    assert [row[0] for row in rows[1:]] == ["denoising", "median", "whole", "density"]
    assert rows[1] == ["denoising", "-", "10.13", "s"]
    assert rows[4][:3] == ["density", "-", "0.37"]


@given(steps=st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_a_log_gets_a_line_at_least_every_quarter_and_one_at_the_end(steps):
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=False))
    display.begin("sparse", steps)
    for done in range(1, steps + 1):
        display.step(done, 0.254)
    display.end()
    lines = stream.getvalue().splitlines()
    at = [int(line.removeprefix("sparse: ").partition("/")[0]) for line in lines]
    assert lines[-1] == f"sparse: {steps}/{steps} steps, density 0.25"
    assert all(b - a <= max(1, steps / 4) for a, b in zip([0, *at], at, strict=False))
    assert len(at) <= 7 and sorted(set(at)) == at


def test_a_terminal_gets_a_bar_that_says_what_is_going_on():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=True, width=120))
    display.begin("dense", 8)
    for done in range(1, 8):
        display.step(done, 0.5)
    assert display.progress.tasks[0].fields["note"] == "density 0.50"
    assert display.progress.tasks[0].completed == 7
    display.step(8, 0.5)
    assert display.progress.tasks[0].fields["note"] == "density 0.50, decoding"
    bar = display.progress
    display.end()
    assert bar.tasks[0].fields["note"] == "density 0.50" and display.progress is None
    assert "8/8 steps" in stream.getvalue()
