"""What counts as a clip, which clips belong together, and which must not be compared."""

import cv2
import numpy as np
import pytest
from job_folders import frames, write_job

from vidsparse.compare.arms import DECISIVE, align, check_conditions, open_arm
from vidsparse.quality.frames import write_clip, write_png, write_preview


@pytest.fixture
def clip():
    return frames(count=3, height=20, width=24)


def test_a_job_gives_its_dense_video_as_reference_and_its_sparse_one_as_test(tmp_path):
    job = write_job(tmp_path / "job", preview=True)
    (dense,) = open_arm(job, "reference").clips.values()
    (sparse,) = open_arm(job, "test").clips.values()
    assert (dense.clip.path.name, dense.arm) == ("dense.mkv", "dense")
    assert (sparse.clip.path.name, sparse.arm) == ("sparse.mkv", "sparse")
    assert (dense.seconds(), sparse.seconds()) == (9.0, 6.0)
    assert open_arm(job, "test").name == "balanced"
    assert open_arm(job, "reference").name == "reference"


def test_a_job_without_a_dense_video_can_be_the_reference(tmp_path):
    job = write_job(tmp_path / "job", dense=False)
    (file,) = open_arm(job, "reference").clips.values()
    assert file.arm == "sparse"


def test_lossless_before_lossy(tmp_path, clip):
    for stem in ("a", "b"):
        write_preview(tmp_path / f"{stem}.mp4", clip, 8)
    write_clip(tmp_path / "a.mkv", clip, 8)
    np.savez(tmp_path / "c.npz", frames=clip)
    (tmp_path / "d").mkdir()
    write_png(tmp_path / "d" / "0.png", clip[0])
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no clip")
    arm = open_arm(tmp_path, "test", "mine")
    assert {name: file.clip.path.name for name, file in arm.clips.items()} == {
        "a": "a.mkv",
        "b": "b.mp4",
        "c": "c.npz",
        "d": "d",
    }
    assert [file.clip.lossless for file in arm.clips.values()] == [True, False, True, True]


def test_a_file_of_a_job_is_what_it_is_in_the_folder(tmp_path, clip):
    """A lossy file knows the lossless one of the same name beside it."""
    job = write_job(tmp_path / "job", preview=True)
    (file,) = open_arm(job / "sparse.mp4", "reference").clips.values()
    (whole,) = open_arm(job, "test").clips.values()
    assert (file.name, file.arm, file.sidecar) == (whole.name, "sparse", whole.sidecar)
    assert file.original == whole.clip != file.clip
    write_clip(tmp_path / "sparse.mkv", clip, 8)
    (alone,) = open_arm(tmp_path / "sparse.mkv", "test").clips.values()
    assert (alone.name, alone.sidecar, alone.original) == ("sparse", None, None)


def test_a_folder_of_pngs_is_one_clip(tmp_path, clip):
    for n, frame in enumerate(clip):
        write_png(tmp_path / f"frame{n}.png", frame)
    arm = open_arm(tmp_path, "test")
    assert list(arm.clips) == [tmp_path.name] and arm.name == tmp_path.name


def test_folders_of_jobs_meet_by_prompt_seed_and_size(tmp_path):
    for n, prompt in enumerate(("a red circle", "a blue ring", "a red circle")):
        write_job(tmp_path / "dense" / f"x{n}", prompt, n)
        write_job(tmp_path / "fast" / f"y{2 - n}", prompt, n, "fast")
    write_job(tmp_path / "fast" / "more", "a red circle", 7, "fast")
    reference, test = open_arm(tmp_path / "dense", "reference"), open_arm(tmp_path / "fast", "test")
    pairs, rest = align(reference, test)
    assert [(a.sidecar["prompt"], a.sidecar["seed"]) for a, _ in pairs] == [
        (b.sidecar["prompt"], b.sidecar["seed"]) for _, b in pairs
    ]
    assert len(pairs) == 3 and rest == ["fast: a-red-circle-seed7"]
    assert {a.clip.path.name for a, _ in pairs} == {"dense.mkv"}


def test_clips_meet_by_name(tmp_path, clip):
    for folder, stems in (("a", "xyz"), ("b", "yzw")):
        (tmp_path / folder).mkdir()
        for stem in stems:
            write_clip(tmp_path / folder / f"{stem}.mkv", clip, 8)
    arms = open_arm(tmp_path / "a", "reference"), open_arm(tmp_path / "b", "test")
    pairs, rest = align(*arms)
    assert [(a.name, b.name) for a, b in pairs] == [("y", "y"), ("z", "z")]
    assert rest == ["reference: x", "b: w"]
    with pytest.raises(ValueError, match="has no sidecar"):
        align(*arms, "manifest")


def test_one_clip_meets_one_clip(tmp_path, clip):
    a, b = (write_clip(tmp_path / name, clip, 8) for name in ("a.mkv", "b.mkv"))
    pairs, rest = align(open_arm(a, "reference"), open_arm(b, "test"))
    assert len(pairs) == 1 and rest == []


def test_no_pair_at_all(tmp_path, clip):
    for folder, stems in (("a", "xy"), ("b", "vw")):
        (tmp_path / folder).mkdir()
        for stem in stems:
            write_clip(tmp_path / folder / f"{stem}.mkv", clip, 8)
    with pytest.raises(ValueError, match=r"no clip of b fits one of the reference by name: x, y"):
        align(open_arm(tmp_path / "a", "reference"), open_arm(tmp_path / "b", "test"))


CHANGES = {
    "model": {"model": {"name": "other", "fingerprint": "cd" * 16}},
    "prompt": {"prompt": "a blue circle"},
    "negative_prompt": {"negative_prompt": "blurry"},
    "seed": {"seed": 1},
    "steps": {"steps": 7},
    "image": {"inputs": {"image": {"file": "a.png", "sha256": "ab" * 32}}},
    "last_image": {"inputs": {"last_image": {"file": "a.png", "sha256": "ab" * 32}}},
    "video": {"inputs": {"video": {"file": "a.mkv", "sha256": "ab" * 32}}},
    "guidance": {"guidance": 5.0},
    "guidance_2": {"guidance_2": 3.0},
    "height": {"height": 96},
    "width": {"width": 96},
    "frames": {"frames": 13},
    "dtype": {"dtype": "bf16"},
    "flow_shift": {"flow_shift": 3.0},
    "gpu": {"gpu": "some GPU"},
}


@pytest.mark.parametrize("field", DECISIVE)
def test_what_must_agree(tmp_path, field):
    write_job(tmp_path / "a")
    write_job(tmp_path / "b", preset="fast", **CHANGES[field])
    arms = open_arm(tmp_path / "a", "reference"), open_arm(tmp_path / "b", "test")
    (a, b), *_ = align(*arms)[0]
    with pytest.raises(ValueError, match=rf"{field} is .* --allow-mismatch {field} compares"):
        check_conditions(a, b)
    check_conditions(a, b, [field])


def test_another_preset_and_time_may_differ(tmp_path):
    write_job(tmp_path / "a")
    write_job(tmp_path / "b", preset="fast", threads=7, density=0.1)
    (a, b), *_ = align(open_arm(tmp_path / "a", "reference"), open_arm(tmp_path / "b", "test"))[0]
    check_conditions(a, b)


def test_paths_without_clips(tmp_path, clip):
    with pytest.raises(ValueError, match="does not exist"):
        open_arm(tmp_path / "nothing", "test")
    with pytest.raises(ValueError, match="holds no clip: expected videos"):
        open_arm(tmp_path, "test")
    job = write_job(tmp_path / "job", lossless=True)
    for name in ("dense.mkv", "sparse.mkv"):
        (job / name).unlink()
    with pytest.raises(ValueError, match="folder of a job, but its videos are gone"):
        open_arm(job, "test")


def test_two_lossless_clips_of_one_name(tmp_path, clip):
    write_clip(tmp_path / "a.mkv", clip, 8)
    np.savez(tmp_path / "a.npz", frames=clip)
    with pytest.raises(ValueError, match=r"several clips named 'a': a\.mkv, a\.npz"):
        open_arm(tmp_path, "test")


def test_two_jobs_of_one_prompt_and_seed(tmp_path):
    write_job(tmp_path / "jobs" / "a")
    write_job(tmp_path / "jobs" / "b", preset="fast")
    with pytest.raises(ValueError, match="holds two clips named 'a-red-circle-seed0'"):
        open_arm(tmp_path / "jobs", "test")


def test_a_video_that_is_none(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match="no video that ffmpeg can read"):
        open_arm(tmp_path, "test")


def test_pngs_with_alpha(tmp_path, clip):
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((20, 20, 4), np.uint8))
    arm = open_arm(tmp_path, "test")
    with pytest.raises(ValueError, match="without alpha"):
        list(next(iter(arm.clips.values())).clip)
