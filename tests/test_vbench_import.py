"""Results of VBench: every trap of its files, scores against hand arithmetic, into a comparison."""

import json

import pytest
from job_folders import write_job

from vidsparse.compare.run import Request as CompareRequest
from vidsparse.compare.run import compare
from vidsparse.vbench.dimensions import DIMENSIONS
from vidsparse.vbench.export import Request, export
from vidsparse.vbench.importing import BEGIN, merge
from vidsparse.vbench.scores import read_results, scores

SIZE = (3, 16, 24)
ARM = "fa<b>st"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison and an export of the same jobs."""
    root = tmp_path_factory.mktemp("vbench")
    for n, prompt in enumerate(["it's red", "a/b"]):
        write_job(root / "jobs" / str(n), prompt, n, report=False, size=SIZE)
    compare(CompareRequest(root / "jobs", [(ARM, root / "jobs")], root / "first"))
    export(Request([(root / "jobs", ARM)], root / "export", custom=True))
    return root


@pytest.fixture
def into(made, tmp_path):
    for file in (made / "first").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def videos(root, arm="fa-b-st"):
    return sorted(str(path) for path in (root / "export" / arm / "videos").iterdir())


def results(folder, content, name="r_eval_results.json"):
    file = folder / name
    file.write_text(json.dumps(content))
    return file


def judged(paths, values, average):
    rows = [{"video_path": p, "video_results": v} for p, v in zip(paths, values, strict=True)]
    return [average, rows]


def test_averages_are_of_the_clips_and_vbenchs_stand_beside_them(made, into):
    paths = videos(made)
    file = results(
        into,
        {
            "imaging_quality": judged(paths, [60.0, 70.0], 0.65),
            "dynamic_degree": judged(paths, [True, False], 0.5),
            "subject_consistency": judged(paths, [0.9, 0.8], 0.87),
        },
    )
    added, notes = merge([file], into, made / "export" / "manifest.json")
    found = added["arms"][ARM]["dimensions"]
    assert {name: one["average"] for name, one in found.items()} == pytest.approx(
        {"imaging_quality": 0.65, "dynamic_degree": 0.5, "subject_consistency": 0.85}
    )
    assert found["subject_consistency"]["reported"] == 0.87
    assert sorted(found["imaging_quality"]["clips"].values()) == pytest.approx([0.6, 0.7])
    assert set(found["imaging_quality"]["clips"]) == {"it-s-red-seed0", "a-b-seed1"}
    assert notes == [
        f"{ARM}: subject_consistency: VBench's own average is 0.87, over clips it is 0.85"
    ]
    assert json.loads((into / "metrics.json").read_text())["vbench"] == added


def test_two_arms_are_paired_and_gaps_are_told(made, into):
    ours, dense = videos(made), videos(made, "dense")
    flicker = {"temporal_flickering": judged(ours, [0.95, 0.97], 0.96)}
    one = results(into, {**flicker, "motion_smoothness": judged(ours, [0.9, 0.9], 0.9)}, "a.json")
    two = results(into, {"temporal_flickering": judged(dense[:1], [0.99], 0.99)}, "b.json")
    added, notes = merge([one, two], into)
    pair = added["pairs"][0]
    assert (pair["a"], pair["b"], pair["n"], pair["measure"]) == (
        ARM, "dense", 1, "temporal_flickering",
    )  # fmt: skip
    assert abs(pair["mean"]) == pytest.approx(0.04)
    assert f"motion_smoothness: only {ARM} was judged in it" in notes
    assert "dense: temporal_flickering: VBench gave no value for 1 of 2 clips" in notes
    metrics = json.loads((into / "metrics.json").read_text())
    for arm, column in ((ARM, "tf_test"), ("dense", "tf_ref")):
        own = [clip[column] for clip in metrics["clips"]]
        assert added["arms"][arm]["temporal_flickering_compared"] == pytest.approx(sum(own) / 2)


def test_an_average_over_two_arms_is_nobodys(made, into):
    both = videos(made)[:1] + videos(made, "dense")[:1]
    file = results(into, {"motion_smoothness": judged(both, [0.5, 0.7], 0.6)})
    added, _ = merge([file], into)
    found = [added["arms"][arm]["dimensions"]["motion_smoothness"] for arm in (ARM, "dense")]
    assert [(one["average"], one["reported"]) for one in found] == [(0.5, None), (0.7, None)]


def test_pages_show_it_once_and_text_stays_text(made, into):
    file = results(into, {"temporal_flickering": judged(videos(made), [0.95, 0.97], 0.96)})
    for _ in range(2):
        merge([file], into)
    page, summary = (into / "report.html").read_text(), (into / "summary.md").read_text()
    assert page.count(BEGIN) == summary.count(BEGIN) == 1
    assert "<td>fa&lt;b&gt;st</td><td>0.9600</td>" in page and "fa<b>st</td>" not in page
    assert page.index("h-vbench") < page.index("</main>")
    assert "| fa&lt;b&gt;st | 0.9600 |" in summary


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "expected dimensions"),
        ([], "expected dimensions"),
        ({"speed": [1, []]}, "'speed' is no dimension of VBench 0.1.5"),
        ({"color": [1]}, "color: expected .average"),
        ({"color": [0.5, []]}, "judged no clip"),
        ({"color": [float("nan"), []]}, "its average is nan"),
        ({"color": [0.5, [{"video_path": "a"}]]}, "a is None, expected a number"),
        ({"color": [0.5, [{"video_results": 1}]]}, "expected a video_path"),
        ({"color": judged(["a", "a"], [1, 2], 1)}, "two results that differ"),
        ({"color": judged(["elsewhere.mp4"], [1], 1)}, "is no clip of the export"),
    ],
)
def test_what_is_no_result_is_refused_and_nothing_is_written(made, into, content, why):
    file = results(into, content)
    before = (into / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match=why):
        merge([file], into, made / "export" / "manifest.json")
    assert (into / "metrics.json").read_bytes() == before


def test_clips_are_found_by_name_only_where_that_is_one(made, into, tmp_path):
    moved = [f"/moved/fa-b-st/videos/{path.rpartition('/')[2]}" for path in videos(made)]
    manifest = made / "export" / "manifest.json"
    merge([results(into, {"color": judged(moved, [1, 0], 0.5)})], into, manifest)
    flat = [f"/flat/{path.rpartition('/')[2]}" for path in videos(made)]
    with pytest.raises(ValueError, match="is in several arms of the export"):
        merge([results(into, {"color": judged(flat, [1, 0], 0.5)})], into, manifest)
    with pytest.raises(ValueError, match="name it with --manifest"):
        merge([results(into, {"color": judged(flat, [1, 0], 0.5)})], into)


def test_results_must_be_of_the_clips_that_were_compared(made, into):
    file = results(into, {"color": judged(videos(made), [1, 0], 0.5)})
    metrics = json.loads((into / "metrics.json").read_text())
    for clip in metrics["clips"]:
        clip["sha256_test"] = "0" * 64
    (into / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="was exported from another file than compared"):
        merge([file], into)
    for clip in metrics["clips"]:
        clip["arm"] = "another"
    (into / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="no clip of fa<b>st was compared there"):
        merge([file], into)
    for content in ({}, {"schema": metrics["schema"]}, {**metrics, "clips": [{"arm": "a"}]}):
        (into / "metrics.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is no folder that `vidsparse compare` wrote"):
            merge([file], into)


HAND = {  # dimension: (score, score scaled to its range by hand)
    "subject_consistency": (0.9, (0.9 - 0.1462) / 0.8538),
    "background_consistency": (0.95, (0.95 - 0.2615) / 0.7385),
    "temporal_flickering": (0.98, (0.98 - 0.6293) / 0.3707),
    "motion_smoothness": (0.97, (0.97 - 0.706) / 0.2915),
    "aesthetic_quality": (0.6, 0.6),
    "imaging_quality": (0.65, 0.65),
    "dynamic_degree": (0.4, 0.4),
    "object_class": (0.8, 0.8),
    "multiple_objects": (0.5, 0.5),
    "human_action": (0.9, 0.9),
    "color": (0.85, 0.85),
    "spatial_relationship": (0.6, 0.6),
    "scene": (0.4, 0.4 / 0.8222),
    "appearance_style": (0.2, (0.2 - 0.0009) / 0.2846),
    "temporal_style": (0.24, 0.24 / 0.364),
    "overall_consistency": (0.26, 0.26 / 0.364),
}


def test_scores_are_those_of_hand_arithmetic():
    scaled = [value for _, value in HAND.values()]
    quality = (sum(scaled[:6]) + 0.5 * scaled[6]) / 6.5
    semantic = sum(scaled[7:]) / 9
    found = scores({name: value for name, (value, _) in HAND.items()})
    assert found.quality == pytest.approx(quality, abs=1e-12)
    assert found.semantic == pytest.approx(semantic, abs=1e-12)
    assert found.total == pytest.approx((4 * quality + semantic) / 5, abs=1e-12)
    assert set(HAND) == set(DIMENSIONS)


@pytest.mark.parametrize("missing", HAND)
def test_a_missing_dimension_leaves_out_what_needs_it(missing):
    found = scores({name: value for name, (value, _) in HAND.items() if name != missing})
    of_quality = DIMENSIONS[missing].group == "quality"
    assert (found.quality is None) == of_quality and (found.semantic is None) != of_quality
    assert found.total is None


def test_booleans_and_percent_are_read(tmp_path):
    content = {
        "human_action": judged(["a", "b", "c"], [True, True, False], 2 / 3),
        "imaging_quality": judged(["a"], [71.5], 0.715),
    }
    found = read_results(results(tmp_path, content))
    assert found["human_action"].average == pytest.approx(2 / 3)
    assert found["imaging_quality"].average == pytest.approx(found["imaging_quality"].reported)
