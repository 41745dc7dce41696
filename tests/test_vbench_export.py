"""Exports: as VBench reads them, one act, and every way in which a clip could be lost."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from job_folders import frames, write_job
from typer.testing import CliRunner

from vidsparse.quality.frames import open_clip, read_clip, write_clip, write_preview
from vidsparse.vbench import export as module
from vidsparse.vbench.commands import app
from vidsparse.vbench.dimensions import DIVERSITY
from vidsparse.vbench.export import Request, export
from vidsparse.vbench.importing import _by_arm
from vidsparse.vbench.scores import Judged

SIZE = (3, 16, 24)


def job(folder, prompt, seed=0, **changes):
    return write_job(folder, prompt, seed, report=False, size=SIZE, **changes)


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Three jobs with their dense videos; not to be changed."""
    folder = tmp_path_factory.mktemp("jobs")
    job(folder / "a", "it's red", 7)
    job(folder / "b", "it's red", 3)
    job(folder / "c", "a blue ring", 1)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips that need no encoding; not to be changed."""
    folder = tmp_path_factory.mktemp("clips")
    for n, prompt in enumerate(["it's red", "a blue ring"]):
        write_preview(folder / f"{prompt}-{n}.mp4", frames(n, *SIZE), 8)
    return folder


def test_the_standard_layout_and_its_manifest(jobs, tmp_path):
    manifest = export(Request([(jobs, None)], tmp_path / "out"))
    clips = ["a blue ring-0.mp4", "it's red-0.mp4", "it's red-1.mp4"]
    for arm in ("balanced", "dense"):
        assert sorted(os.listdir(tmp_path / "out" / arm / "videos")) == clips
        assert sorted(os.listdir(tmp_path / "out" / arm)) == ["prompts.json", "videos"]
        prompts = json.loads((tmp_path / "out" / arm / "prompts.json").read_text())
        assert prompts == dict(zip(clips, ["a blue ring", "it's red", "it's red"], strict=True))
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    line = manifest["clips"]["balanced/videos/it's red-0.mp4"]
    assert (line["seed"], line["index"], line["clip"]) == (3, 0, "it-s-red-seed3")
    video = open_clip(tmp_path / "out" / "balanced" / "videos" / "it's red-0.mp4")
    assert (video.codec, video.fps, read_clip(video.path).shape) == ("h264", 8.0, (*SIZE, 3))


def test_numbers_follow_the_seeds_of_all_arms_together(jobs, tmp_path):
    job(tmp_path / "fast" / "a", "it's red", 7, preset="fast", dense=False)
    said = []
    listener = module.Listener()
    listener.say = said.append
    sources = [(jobs, None), (tmp_path / "fast", None)]
    manifest = export(Request(sources, tmp_path / "out"), listener)
    assert [c for c in manifest["clips"] if c.startswith("fast")] == ["fast/videos/it's red-1.mp4"]
    assert "note: fast lacks 2 of 3 clips of other arms" in said


def test_lossy_sources_are_linked_and_others_encoded_alike(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    source = write_preview(videos / "a cat-1.mp4", frames(0, *SIZE), 8)
    write_clip(videos / "a dog-0.mkv", frames(1, *SIZE), 8)
    manifest = export(Request([(videos, "ours")], tmp_path / "out"))
    linked = tmp_path / "out" / "ours" / "videos" / "a cat-1.mp4"
    assert linked.samefile(source)
    assert [c["encode"] for c in manifest["clips"].values()] == [module.KEPT, module.ENCODE]
    assert {c["prompt"] for c in manifest["clips"].values()} == {"a cat", "a dog"}


def test_clips_without_a_frame_rate_need_one(tmp_path):
    (tmp_path / "v").mkdir()
    np.savez(tmp_path / "v" / "a cat.npz", frames=frames(0, *SIZE))
    with pytest.raises(ValueError, match="give --fps"):
        export(Request([(tmp_path / "v", None)], tmp_path / "out"))
    assert os.listdir(tmp_path) == ["v"]
    export(Request([(tmp_path / "v", None)], tmp_path / "out", fps=12))
    assert open_clip(tmp_path / "out" / "v" / "videos" / "a cat-0.mp4").fps == 12


def test_an_export_replaces_an_earlier_one_and_nothing_else(clips, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    request = Request([(clips, "first")], out)
    export(request)
    before = tree(out)
    export(Request([(clips, "other")], out))
    assert not (out / "first").exists() and len(tree(out)) == len(before) == 5
    (out / "other" / "videos" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"other/videos/mine\.txt is no part of it"):
        export(request)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x").touch()
    for place, why in ((foreign, "not empty"), (foreign / "x", "is a file")):
        with pytest.raises(ValueError, match=why):
            export(Request([(clips, None)], place))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_a_failure_nothing_is_there_and_the_old_export_is(
    clips, tmp_path, monkeypatch, error
):
    out = tmp_path / "out"
    export(Request([(clips, None)], out))
    before = {name: (out / name).read_bytes() for name in tree(out)}
    calls = []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return link(*args, **options)

    link = module._link
    monkeypatch.setattr(module, "_link", fail)
    for place in (out, tmp_path / "other"):
        calls.clear()
        with pytest.raises(error):
            export(Request([(clips, None)], place))
    assert {name: (out / name).read_bytes() for name in tree(out)} == before
    assert os.listdir(tmp_path) == ["out"]


def full_info(folder, entries):
    file = folder / "info.json"
    file.write_text(json.dumps([{"prompt_en": p, "dimension": d} for p, d in entries]))
    return file


def test_prompts_and_numbers_that_vbench_ignores_are_refused(jobs, tmp_path):
    info = full_info(tmp_path, [("it's red", ["temporal_flickering"])])
    with pytest.raises(ValueError, match="'a blue ring' is no prompt of"):
        export(Request([(jobs, None)], tmp_path / "out", full_info=info))
    many = tmp_path / "many"
    many.mkdir()
    for n in (0, 5):
        write_preview(many / f"it's red-{n}.mp4", frames(n, *SIZE), 8)
    with pytest.raises(ValueError, match="sample number 5, VBench reads 0 to 4; with --full-info"):
        export(Request([(many, None)], tmp_path / "out"))
    export(Request([(many, None)], tmp_path / "out", full_info=info))
    write_preview(many / "it's red-24.mp4", frames(24, *SIZE), 8)
    export(Request([(many, None)], tmp_path / "out", full_info=info))
    write_preview(many / "it's red-25.mp4", frames(25, *SIZE), 8)
    with pytest.raises(ValueError, match="0 to 24"):
        export(Request([(many, None)], tmp_path / "out", full_info=info))
    info.write_text("{}x")
    with pytest.raises(ValueError, match="expected the list of prompts"):
        export(Request([(many, None)], tmp_path / "out", full_info=info))


def test_the_second_layout_has_a_folder_per_dimension(jobs, tmp_path):
    request = Request([(jobs, None)], tmp_path / "out", version=2)
    with pytest.raises(ValueError, match="a folder per dimension: say which with --dimension"):
        export(request)
    info = full_info(tmp_path, [("it's red", [DIVERSITY]), ("a blue ring", ["Material"]),
                                ("a blue ring", [DIVERSITY])])  # fmt: skip
    manifest = export(Request([(jobs, None)], tmp_path / "out", version=2, full_info=info))
    videos = tmp_path / "out" / "dense" / "videos"
    assert tree(videos) == ["Diversity/a blue ring-0.mp4", "Diversity/it's red-0.mp4",
                            "Diversity/it's red-1.mp4", "Material/a blue ring-0.mp4"]  # fmt: skip
    assert (videos / "Material" / "a blue ring-0.mp4").samefile(
        videos / "Diversity" / "a blue ring-0.mp4"
    )
    assert manifest["clips"]["dense/videos/Material/a blue ring-0.mp4"]["dimension"] == "Material"
    with pytest.raises(ValueError, match="--dimension Color: there are Human_Anatomy"):
        export(Request([(jobs, None)], tmp_path / "out", version=2, dimensions=("Color",)))


def test_prompts_that_share_180_characters_cannot_be_told_apart_in_the_second_layout(tmp_path):
    for n in range(2):
        job(tmp_path / "jobs" / str(n), "x" * 180 + str(n), n)
    request = Request([(tmp_path / "jobs", None)], tmp_path / "out", 2, dimensions=("Material",))
    with pytest.raises(ValueError, match="would both be"):
        export(request)


def test_dense_videos_that_differ_are_refused(tmp_path):
    for arm in ("balanced", "fast"):
        job(tmp_path / arm / "a", "it's red", 7, preset=arm)
    sources = [(tmp_path / "balanced", None), (tmp_path / "fast", None)]
    export(Request(sources, tmp_path / "out"))
    write_clip(tmp_path / "fast" / "a" / "dense.mkv", frames(9, *SIZE), 8)
    with pytest.raises(ValueError, match="are dense videos of one prompt and seed, and differ"):
        export(Request(sources, tmp_path / "out"))


def test_arms_that_would_share_a_folder_are_refused(jobs, tmp_path):
    other = tmp_path / "other"
    job(other / "a", "it's red", 7, dense=False)
    with pytest.raises(ValueError, match="'Fast' and 'fast' would share a folder"):
        export(Request([(jobs, "Fast"), (other, "fast")], tmp_path / "out"))
    with pytest.raises(ValueError, match="two arms named 'balanced'"):
        export(Request([(jobs, None), (other, None)], tmp_path / "out"))


def test_clips_with_and_without_seeds_do_not_mix(jobs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_preview(other / "it's red-0.mp4", frames(0, *SIZE), 8)
    with pytest.raises(ValueError, match="some clips say their seed and some do not"):
        export(Request([(jobs, None), (other, None)], tmp_path / "out"))


@pytest.mark.parametrize("custom", [False, True])
def test_every_exported_clip_finds_its_way_back(jobs, tmp_path, custom):
    sources = [(jobs, None)]
    if custom:
        job(tmp_path / "more" / "d", "a/b: $x", 0, preset="fast", dense=False)
        sources.append((tmp_path / "more", None))
    manifest = export(Request(sources, tmp_path / "out", custom=custom))
    for arm in manifest["arms"]:
        videos = tmp_path / "out" / arm / "videos"
        judged = {str(path): float(n) for n, path in enumerate(sorted(videos.iterdir()))}
        found = _by_arm(Path("r.json"), Judged(judged, 0), manifest)
        assert list(found) == [arm] and len(found[arm]) == len(judged) == (
            1 if arm == "fast" else 3
        )
        for path, value in judged.items():
            line = manifest["clips"][Path(path).relative_to(tmp_path / "out").as_posix()]
            assert found[arm][line["clip"]] == value


def test_the_command_line_says_mistakes_in_one_line(clips, tmp_path):
    (tmp_path / "a=b").mkdir()
    np.savez(tmp_path / "none.npz", frames=np.zeros((0, *SIZE[1:], 3), np.uint8), fps=8)
    out = str(tmp_path / "out")
    for arguments, said in (
        (["--from", str(tmp_path / "none"), "-o", out], "none does not exist"),
        (["--from", str(tmp_path / "a=b"), "-o", out], "a=b holds no clip"),
        (["--from", str(clips), "-o", out, "--version", "3"], "--version 3"),
        (["--from", "", "-o", out], "--from is empty"),
        (["--from", str(clips), "-o", ""], "--out is empty"),
        (["--from", str(tmp_path / "none.npz"), "--custom", "-o", out], "none.npz holds no frames"),
    ):
        done = CliRunner().invoke(app, ["export", *arguments])
        lines = [line for line in done.stderr.splitlines() if line.startswith("vidsparse: ")]
        assert done.exit_code == 2 and len(lines) == 1 and said in lines[0], done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["export", "--from", f"{clips}=mine", "-o", str(tmp_path / "o")])
    assert done.exit_code == 0 and (tmp_path / "o" / "mine").is_dir()
