"""report.html in a real browser: one file, every view on the same frame, text stays text."""

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from job_folders import DENSE_STEPS, HEADS, LAYERS, STEPS, calls, write_job

from vidsparse.compare.measure import KEPT, Settings
from vidsparse.compare.run import Request, compare

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
EVIL = "</script><b onmouseover=alert(1)>\"'& \x1b[31mred"
FRAMES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two arms over two clips; the reference of every clip darkens from frame to frame."""
    root = tmp_path_factory.mktemp("compared")
    for n, prompt in enumerate(("a red circle", EVIL)):
        for preset, noise in (("balanced", 3.0), ("fast", 9.0)):
            write_job(
                root / preset / f"job{n}", prompt, n, preset, noise=noise, size=(FRAMES, 48, 64)
            )
    tests = [(None, root / "balanced"), (None, root / "fast")]
    compare(Request(root / "balanced", tests, root / "out", settings=Settings()))
    return root / "out"


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def embedded(page):
    """The data that the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


class Elements(HTMLParser):
    """Start tags of a page, and the attributes that could ask the network for something."""

    def __init__(self):
        super().__init__()
        self.tags, self.asks, self.content = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.content += [v for k, v in attributes if k == "content"]
        self.asks += [
            (tag, k, v) for k, v in attributes if k in ("src", "href", "srcset", "action")
        ]


def test_nothing_outside_the_file_is_asked_for(page):
    elements = Elements()
    elements.feed(page)
    assert elements.asks == []
    assert elements.tags.count("script") == 3 + 4  # data, charts, page; a video per clip
    (policy,) = [v for v in elements.content if v and "default-src" in v]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_text_of_others_stays_text(page):
    assert "<b onmouseover" not in page and "\x1b" not in page
    prompts = {clip["prompt"] for clip in embedded(page)["clips"]}
    assert prompts == {"a red circle", EVIL.replace("\x1b", "\\x1b")}


def test_heat_map_holds_the_report(page):
    trace = embedded(page)["clips"][0]["trace"]
    assert (trace["steps"], trace["layers"]) == (STEPS, LAYERS)
    assert [group["name"] for group in trace["groups"]] == [
        "transformer, cond",
        "transformer, uncond",
    ]
    for group, branch in zip(trace["groups"], ("cond", "uncond"), strict=True):
        density = np.frombuffer(base64.b64decode(group["density"]), np.uint8)
        density = density.reshape(STEPS, LAYERS, HEADS)
        reason = np.frombuffer(base64.b64decode(group["reason"]), np.uint8).reshape(STEPS, LAYERS)
        for call in calls():
            if call["branch"] != branch:
                continue
            at = call["step"], call["layer"]
            assert density[at] == pytest.approx(255 * np.array(call["density"]), abs=0.5)
            assert trace["reasons"][reason[at]] == (
                "a dense step of the schedule" if call["reason"] else "sparse"
            )


def test_predicted_time(page):
    """By hand: 12 dense and 16 sparse calls a branch, see job_folders."""
    time = embedded(page)["clips"][0]["time"]
    spent = {"dense": 0.25 * 2 * LAYERS * DENSE_STEPS}
    spent["kernel"] = 0.05 * 2 * LAYERS * (STEPS - DENSE_STEPS)
    spent["estimate"] = 0.01 * 2 * LAYERS * (STEPS - DENSE_STEPS)
    stages = {stage["name"]: sum(stage["seconds"]) for stage in time["stages"]}
    rest = stages.pop("everything else")
    assert stages == pytest.approx(spent)
    dense_steps = 0.0  # their attention takes longer than the whole step in this made-up report
    assert rest == pytest.approx(dense_steps + 4 * (0.75 - 8 * 0.06))
    assert time["predicted"] == pytest.approx(rest + (9.0 - rest) * 0.48)
    assert (time["reference"], time["measured"]) == (9.0, 6.0)


def test_page_keeps_its_bound(folder, tmp_path):
    size = (folder / "report.html").stat().st_size
    root = folder.parent
    tests = [(None, root / "balanced"), (None, root / "fast")]
    shutil.copytree(folder / KEPT, tmp_path / KEPT)  # measured already
    compare(Request(root / "balanced", tests, tmp_path, report_mb=0.5))
    small = (tmp_path / "report.html").read_text()
    assert len(small.encode()) <= 0.5e6 < size
    dropped = [clip for clip in embedded(small)["clips"] if clip["video"] is None]
    assert dropped and all("larger than --report-mb" in clip["no_video"] for clip in dropped)


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright import sync_api
    except ImportError:
        pytest.skip("playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium, or set CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, folder):
    """The page, opened from disk; every complaint of the browser fails the test."""
    complaints, requests = [], []
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(f"file://{folder}/report.html")
    tab.wait_for_function("() => document.querySelector('#stage').dataset.frame === '0'")
    yield tab
    tab.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
    assert sum(url.startswith("file:") for url in requests) == 1


BRIGHTNESS = """(id) => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2];
  return sum / (data.length / 4) / 3;
}"""


def frame_of(tab):
    return int(tab.evaluate("document.querySelector('#stage').dataset.frame"))


def settle(tab, frame):
    """Wait until the player says that it shows a frame, and has drawn it."""
    tab.wait_for_function(
        "f => document.querySelector('#stage').dataset.frame === String(f) && "
        "!document.querySelector('#play').matches('[aria-pressed=true]')",
        arg=frame,
    )
    tab.wait_for_timeout(250)


def shown(tab, view):
    """A canvas as an array [height, width, 3]."""
    url = tab.evaluate(f"document.getElementById('view-{view}').toDataURL('image/png')")
    import cv2

    data = np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1].astype(float)


def expected(view, frame):
    """What a view must show of the first clip, at the size of the page."""
    from job_folders import frames

    from vidsparse.quality.frames import enlarge

    reference, test = frames(0, FRAMES, 48, 64), frames(0, FRAMES, 48, 64, noise=3.0)
    if view == "difference":
        difference = 8 * np.abs(reference[frame].astype(int) - test[frame])
        return enlarge(np.clip(difference, 0, 255).astype(np.uint8), 5).astype(float)
    return enlarge((reference if view == "reference" else test)[frame], 5).astype(float)


@pytest.mark.parametrize("frame", [0, 1, 13, FRAMES - 1])
def test_every_view_shows_the_frame_that_was_sought(tab, frame):
    tab.evaluate(
        "f => { const s = document.querySelector('#seek'); s.value = f; "
        "s.dispatchEvent(new Event('input')); }",
        frame,
    )
    settle(tab, frame)
    for view in ("reference", "test"):
        errors = [np.abs(shown(tab, view) - expected(view, f)).mean() for f in range(FRAMES)]
        assert int(np.argmin(errors)) == frame and errors[frame] < 12, view


def test_steps_and_keys(tab):
    tab.click("#forward")
    settle(tab, 1)
    tab.click("#forward")
    settle(tab, 2)
    tab.click("#back")
    settle(tab, 1)
    tab.locator("h1").click()
    tab.keyboard.press("ArrowRight")
    settle(tab, 2)
    tab.keyboard.press("w")
    worst = int(
        tab.evaluate("JSON.parse(document.getElementById('data').textContent).clips[0].worst_frame")
    )
    settle(tab, worst)


def test_plays_to_the_end_and_again(tab):
    tab.click("#play")
    tab.wait_for_function("() => document.querySelector('#play').textContent === 'Pause'")
    tab.wait_for_function(
        f"() => document.querySelector('#stage').dataset.frame === '{FRAMES - 1}'"
    )
    tab.wait_for_function("() => document.querySelector('#play').textContent === 'Play'")
    errors = [
        np.abs(shown(tab, "reference") - expected("reference", f)).mean() for f in range(FRAMES)
    ]
    assert int(np.argmin(errors)) == FRAMES - 1


def test_loops_the_worst_second(tab):
    clip = tab.evaluate("JSON.parse(document.getElementById('data').textContent).clips[0]")
    start, stop = clip["worst_second"]
    tab.check("#loop")
    tab.click("#play")
    seen = set()
    for _ in range(30):
        tab.wait_for_timeout(100)
        seen.add(frame_of(tab))
    tab.click("#play")
    assert min(seen) >= start and max(seen) <= stop
    assert len(seen) > 2


def test_click_on_a_curve_goes_to_its_frame(tab):
    tab.locator("#chart-psnr .u-over").scroll_into_view_if_needed()
    over = tab.locator("#chart-psnr .u-over").bounding_box()
    x = over["x"] + over["width"] * 10 / (FRAMES - 1)
    tab.mouse.move(x, over["y"] + 20)
    tab.mouse.click(x, over["y"] + 20)
    settle(tab, 10)


def test_hover_over_the_heat_map(tab):
    tab.locator("#heat").scroll_into_view_if_needed()
    box = tab.locator("#heat").bounding_box()
    step, layer = 3, 2
    left = 40
    x = box["x"] + left + (step + 0.5) * (box["width"] - left - 4) / STEPS
    y = box["y"] + (layer + 0.5) * 18
    tab.mouse.move(x, y)
    text = tab.locator("#cell").inner_text()
    (call,) = [c for c in calls() if (c["step"], c["layer"], c["branch"]) == (step, layer, "cond")]
    assert f"step {step}, layer {layer}" in text
    mean = float(re.search(r"density (\d\.\d{3}), mean over 3 heads", text)[1])
    assert mean == pytest.approx(np.mean(call["density"]), abs=1 / 255)
    for head, density in enumerate(call["density"]):
        line = rf"head {head}\s+(\d\.\d{{3}})"
        assert float(re.search(line, text)[1]) == pytest.approx(density, abs=1 / 255)
    tab.focus("#heat")
    for _ in range(step):
        tab.keyboard.press("ArrowLeft")
    assert "dense: a dense step of the schedule" in tab.locator("#cell").inner_text()


def test_another_clip(tab):
    tab.select_option("#clip", "1")
    assert EVIL.replace("\x1b", "\\x1b") in tab.locator("#prompt").inner_text()
    assert tab.locator("#prompt b").count() == 0


def test_wipe(tab):
    tab.check("#wipe-on")
    tab.wait_for_timeout(200)
    assert tab.locator("#view-wipe").is_visible() and not tab.locator("#view-test").is_visible()
    for position, view in ((100, "reference"), (0, "test")):
        tab.evaluate(
            "p => { const s = document.querySelector('#wipe'); s.value = p; "
            "s.dispatchEvent(new Event('input')); }",
            position,
        )
        wiped, whole = shown(tab, "wipe"), shown(tab, view)
        assert np.abs(wiped - whole)[:, 4:-4].max() == 0


def test_copies_the_command(tab):
    tab.click("[data-copy=command]")
    tab.wait_for_function("() => document.querySelector('#copied').textContent !== ''")


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (800, "dark"), (390, "light")])
def test_no_page_is_wider_than_its_window(browser, folder, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(f"file://{folder}/report.html")
    tab.wait_for_function("() => document.querySelector('#stage').dataset.frame === '0'")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
    context.close()
