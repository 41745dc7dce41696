"""`vidsparse inspect`: its figures against definitions, its recorder, its pictures and its page."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import imageio.v2 as iio
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

import vidsparse
from vidsparse import cli, drawing
from vidsparse.accelerate import observing
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.inspecting import measure
from vidsparse.inspecting.capture import Recorder
from vidsparse.inspecting.choice import Choice, choose_parts, choose_query, choose_steps, spans
from vidsparse.inspecting.figures import chosen_frames, window
from vidsparse.inspecting.measure import Truth, figures, truth
from vidsparse.inspecting.places import OMITTED, Places, frame_of
from vidsparse.inspecting.run import _never_sparse
from vidsparse.pipelines.installation import installation_of
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import SKIP, BlockPlan

CONFIG = SparseConfig.from_dict(tiny.SPARSE)
CHOICE = Choice(steps=(1, 3), layers=(0, 1), heads=(1,), query=(1, 2, 3))
EVIL = "</title><b onmouseover=alert(1)>\"'& \x1b[31m$a$"


@pytest.mark.parametrize("strip", [1, 2**24], ids=["block by block", "at once"])
def test_true_mass_and_error_follow_the_definition(strip, monkeypatch):
    monkeypatch.setattr(measure, "STRIP", strip)
    grid = TokenGrid(2, 5, 5)  # 50 tokens: the last blocks are short
    cuts = Blocks.cut(grid, 16), Blocks.cut(grid, 32)
    torch.manual_seed(0)
    q, k, v, out = (torch.randn(50, 8) for _ in range(4))
    found = truth(q, k, v, out, cuts)
    mass, missed, total = np.zeros((4, 2)), 0.0, 0.0
    for i in range(50):
        logits = [float(q[i].double() @ k[j].double()) / 8**0.5 for j in range(50)]
        weight = np.exp(logits) / np.exp(logits).sum()
        for j in range(50):
            mass[i // 16, j // 32] += weight[j] / (16 if i < 48 else 2)
        full = weight @ v.double().numpy()
        missed += ((out[i].double().numpy() - full) ** 2).sum()
        total += (full**2).sum()
    np.testing.assert_allclose(found.mass, mass, rtol=1e-5)
    assert found.error == pytest.approx((missed / total) ** 0.5, rel=1e-5)


def test_recall_is_the_listed_mass_weighted_by_queries():
    blocks = Blocks.cut(TokenGrid(1, 1, 40), 16)  # 16, 16 and 8 tokens
    mass = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    levels = torch.tensor([[0, SKIP, SKIP], [SKIP, 2, 0], [SKIP, SKIP, 0]], dtype=torch.int8)
    plan = BlockPlan.from_levels(levels[None, None], blocks, blocks)
    found = figures(Truth(mass, 0.25), plan, 0)
    assert found.recall == pytest.approx((16 * 0.5 + 16 * 0.9 + 8 * 0.1) / 40)
    assert found.best == pytest.approx((16 * 0.5 + 16 * 0.9 + 8 * 0.6) / 40)
    assert (found.error, found.density) == (0.25, pytest.approx(float(plan.density[0, 0])))


def test_recorder_leaves_pixels_and_no_trace():
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, CONFIG)
    before = tiny.run(pipe, call)
    recorder = Recorder(CONFIG, CHOICE)
    with recorder.recording(pipe):
        during = tiny.run(pipe, call)
    kept = dict(recorder.figures)
    assert torch.equal(before, during)
    assert torch.equal(before, tiny.run(pipe, call)) and recorder.figures == kept
    assert installation_of(pipe.transformer).observers == []
    assert sorted(kept) == [(s, n, h) for s in (1, 3) for n in (0, 1) for h in (0, 1)]
    assert sorted(recorder.maps) == [(s, n, 1) for s in (1, 3) for n in (0, 1)]
    assert recorder.film[0] == "warmup-step" and sorted(recorder.film) == [0, 1, 2, 3]
    for found in kept.values():
        assert 0 < found.recall <= found.best <= 1 and found.error > 0
    for maps in recorder.maps.values():
        for mass in (maps.draft, maps.mass):
            torch.testing.assert_close(mass.sum(-1), torch.ones(len(mass)))


def test_observer_that_raises_is_taken_away():
    pipe, call = tiny.build("wan")

    def observer(call):
        raise KeyError("mine")

    with pytest.raises(ValueError, match="not accelerated"), observing(pipe, observer):
        pass
    vidsparse.accelerate_pipeline(pipe, CONFIG)
    with pytest.raises(KeyError, match="mine"), observing(pipe, observer):
        tiny.run(pipe, call)
    assert installation_of(pipe.transformer).observers == []


def test_captured_plan_is_that_of_the_operator():
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, CONFIG)
    recorder, seen = Recorder(CONFIG, CHOICE), []
    with recorder.recording(pipe), observing(pipe, seen.append):
        tiny.run(pipe, call)
    at = [(c.context.step, c.context.layer, c.context.branch) for c in seen]
    one = seen[at.index((3, 1, "cond"))]
    inverse = token_order(one.grid, CONFIG.layout)[1]
    raster = [x.index_select(1, inverse) for x in (one.q, one.k, one.v)]
    out, plan = vidsparse.sparse_attention(
        *raster, grid=one.grid, config=CONFIG, context=one.context, return_plan=True
    )
    assert torch.equal(recorder.maps[3, 1, 1].plan.levels, plan.levels[0, 1])
    torch.testing.assert_close(out, one.result.out.index_select(1, inverse))


def test_levels_stand_where_the_tokens_are():
    grid = TokenGrid(3, 4, 6)
    cuts = Blocks.cut(grid, 16), Blocks.cut(grid, 8)
    places = Places.of(grid, CONFIG.layout, cuts)
    order = token_order(grid, CONFIG.layout)[0]
    torch.manual_seed(1)
    levels = torch.randint(-1, 4, (len(cuts[0]), len(cuts[1])), dtype=torch.int8)
    tile = places.tile((1, 2, 3))
    volume, own = places.levels(levels, 3, tile), places.tokens(tile)
    assert own[1, 2, 3] and own.sum() == int(cuts[0].count[tile])
    for place, raster in enumerate(order.tolist()):
        at = np.unravel_index(raster, (3, 4, 6))
        code = int(levels[tile, place // 8])
        assert volume[at] == (OMITTED if code == SKIP else code)
        assert own[at] == (place // 16 == tile)
    assert (places.levels(levels, SKIP, tile) >= SKIP).all()


def test_windows_and_frames():
    assert list(window(99, 50)) == list(range(99))
    assert len(window(1000, 3)) == 128 and 3 in window(1000, 3) and 999 in window(1000, 999)
    assert [frame_of(n, 11, 21) for n in (0, 1, 10)] == [0, 2, 20]
    assert [frame_of(n, 21, 81) for n in (0, 1, 20)] == [0, 4, 80] and frame_of(0, 1, 1) == 0
    own = np.zeros((40, 1, 1), bool)
    own[17] = True
    frames = chosen_frames(own, 12)
    assert len(frames) == 12 and {0, 17, 39} <= set(frames) and frames == sorted(frames)


def test_what_is_chosen_and_what_is_refused():
    assert choose_steps(CONFIG, 4, ()) == (1, 2, 3) and choose_steps(CONFIG, 4, (3, 1)) == (1, 3)
    for steps, asked, said in (
        (4, [0], "--step 0: dense by the schedule; allowed: 1 .. 3"),
        (4, [4], "--step 4: not in this run of 4 steps; allowed: 1 .. 3"),
        (1, [], "all 1 steps dense"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_steps(CONFIG, steps, asked)
    layered = CONFIG.override("schedule.dense_layers=[0,-1]")
    assert choose_parts(layered, (1,), 4, 30, 12, ((), ())) == ((1, 15, 28), (0, 4, 7, 11))
    for layer, head, said in (
        (0, 0, "--layer 0: dense by the schedule; allowed: 1 .. 28"),
        (30, 0, "--layer 30: the model has 30; allowed: 1 .. 28"),
        (1, 12, "--head 12: the model has 12; allowed: 0 .. 11"),
        (1, -1, "--head -1: the model has 12"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_parts(layered, (1,), 4, 30, 12, ([layer], [head]))
    assert choose_query(None, (3, 4, 6)) == (1, 2, 3) == choose_query("1,2,3", (3, 4, 6))
    for text in ("1,2", "1,2,6", "a,b,c", "-1,0,0"):
        with pytest.raises(ValueError, match="from 0,0,0 to 2,3,5"):
            choose_query(text, (3, 4, 6))
    assert spans([0, 3, 4, 5, 9]) == "0, 3 .. 5, 9"


SMALL = ("--height=64", "--width=48", "--frames=5", "--steps=3", "--guidance=1")
SETTINGS = ("min_tokens=0", "dense_layers=[]", "dense_steps=1")


def command(model, out, *args):
    keys = [f"schedule.{key}" for key in SETTINGS] + ["kernel.block_q=16", "kernel.block_k=16"]
    settings = [item for key in [*keys, "compensation.name=centroid"] for item in ("--set", key)]
    asked = ["inspect", "--model", str(model), "-o", str(out), *SMALL, *settings, *map(str, args)]
    with tiny.one_thread():
        return CliRunner().invoke(cli.app, asked, prog_name="vidsparse")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.build("wan")[0].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspected") / "out"
    result = command(model, out, "--prompt", EVIL, "--layer", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["out"] == str(out) and "sparse: 3/3" in result.stderr
    return out


def test_pictures_are_there_sized_and_not_blank(folder):
    content = json.loads((folder / "metrics.json").read_text())
    assert set(content["files"]) == {path.name for path in folder.iterdir()}
    assert content["chosen"] == {
        "steps": [1, 2],
        "layers": [1],
        "heads": [0, 1],
        "query": [1, 2, 1],
    }
    assert len(content["heads"]) == 2 * 2 * 2
    pictures = [name for name in content["files"] if name.endswith(".png")]
    assert len(pictures) == 2 + 2 * (1 + 2)
    for name in pictures:
        image = cv2.imread(str(folder / name))
        assert image.shape[1] == round(drawing.PAGE * drawing.DPI), name
        assert (image != 255).mean() > 0.05 and len(np.unique(image)) > 20, name
    (film,) = [name for name in content["files"] if name.endswith(".gif")]
    assert film == "levels-layer01-head00.gif"
    assert len(iio.mimread(folder / film)) == 3


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags, self.text, self.policy = [], [], "", ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        known = dict(attributes)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if "Policy" in known.get("http-equiv", ""):
            self.policy = known["content"]

    def handle_data(self, data):
        self.text += data


def test_page_shows_all_and_asks_for_nothing_elsewhere(folder):
    page = Elements()
    page.feed((folder / "index.html").read_text())
    files = {link for link in page.links if not link.startswith("#")}
    assert files == {path.name for path in folder.iterdir()} - {"index.html"}
    assert "script" not in page.tags and page.policy.startswith("default-src 'none'; ")
    assert "b" not in page.tags and EVIL.replace("\x1b", "\\x1b") in page.text
    assert "of the true mass" in page.text


def test_folder_is_replaced_as_one(model, folder, tmp_path):
    refused = command(model, folder, "--prompt", "a monkey dances")
    assert refused.exit_code == 2 and "it holds another job" in refused.stderr
    (folder / "mine.txt").write_text("mine")
    done = command(
        model, folder, "--prompt", "a monkey", "--layer=0", "--head=0", "--step=2", "--overwrite"
    )
    assert done.exit_code == 0, done.stderr
    listed = json.loads((folder / "metrics.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*listed, "mine.txt"}
    assert "mass-step02-layer00.png" in listed


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--step", 7), "--step 7: not in this run of 3 steps; allowed: 1 .. 2"),
        (("--layer", 2), "--layer 2: the model has 2; allowed: 0 .. 1"),
        (("--head", 9), "--head 9: the model has 2; allowed: 0 .. 1"),
        (("--query", "9,9,9"), "--query 9,9,9: expected FRAME,ROW,COLUMN"),
        (("--set", "schedule.density=1"), "all 3 steps dense"),
        (("--set", "schedule.min_tokens=5000"), "nothing was sparse in step 1 .. 2"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, args, said):
    result = command(model, tmp_path / "out", "--prompt", "a monkey", *args)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_said_before_anything_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = command(model, tmp_path / "out", "--prompt", "a monkey")
    assert result.exit_code == 2 and "pip install 'matplotlib" in result.stderr
    assert "loading" not in result.stderr


def test_a_run_that_was_dense_says_why():
    call = SimpleNamespace(step=1, reason="too-short")
    said = _never_sparse(SimpleNamespace(report=SimpleNamespace(calls=[call])), CHOICE)
    assert "too-short: fewer tokens than schedule.min_tokens" in said


def test_plot_of_a_loaded_report_is_that_of_the_run(tmp_path):
    import matplotlib

    pipe, call = tiny.build("wan22")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["schedule.dense_layers=[1]"])
    report = vidsparse.run_report(pipe)
    with pytest.raises(ValueError, match="no calls"):
        report.plot(tmp_path / "none.png")
    tiny.run(pipe, call)
    report = vidsparse.run_report(pipe)
    before = dict(matplotlib.rcParams)
    first = iio.imread(report.plot(tmp_path / "here.png"))
    loaded = RunReport.load(report.save(tmp_path / "report.json"))
    second = iio.imread(loaded.plot(str(tmp_path / "there.png")))
    assert np.array_equal(first, second) and dict(matplotlib.rcParams) == before
    assert first.shape[1] == round(drawing.PAGE * drawing.DPI) and len(np.unique(first)) > 20
    assert loaded.plot(tmp_path / "map.svg").read_text().startswith("<?xml")
    for name in ("map", "map.xyz"):
        with pytest.raises(ValueError, match="expected a name that ends in one of"):
            report.plot(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {
        "here.png",
        "there.png",
        "report.json",
        "map.svg",
    }
