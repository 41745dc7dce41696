"""`vidsparse capture`: what is kept is what attention got, and an interrupted run goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vidsparse.capturing import files
from vidsparse.capturing import run as capturing
from vidsparse.capturing.run import Wanted, capture, chosen
from vidsparse.cli import app
from vidsparse.generate.clock import Listener
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 3}
WANTED = Wanted(steps=(1, 2), layers=(0, 5), heads=(1,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captures")
    made = capture(Request(**SMALL), WANTED, out)
    assert made["made"] == len(made["files"]) == 4
    return out


def test_what_is_kept_is_what_the_stock_pipeline_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock attention primitive is watched in a run without vidsparse."""
    from diffusers.models.transformers import transformer_wan as wan

    from vidsparse.generate.job import prepare
    from vidsparse.generate.run import load

    job, seen = prepare(Request(**SMALL)), []
    pipe, stock = load(job, Listener()), wan.dispatch_attention_fn

    def watched(query: Any, key: Any, value: Any, *args: Any, **more: Any) -> Any:
        if query.shape[1] == key.shape[1]:
            seen.append((query, key, value))
        return stock(query, key, value, *args, **more)

    monkeypatch.setattr(wan, "dispatch_attention_fn", watched)
    pipe(**job.call, generator=torch.Generator().manual_seed(0), output_type="latent")
    branches = len(seen) // (3 * 6)
    for step in (1, 2):
        for layer in (0, 5):
            one = files.read(files.file_of(folder, step, layer))
            assert (one.about.step, one.about.layer, one.about.heads) == (step, layer, (1,))
            assert one.grid.tokens == one.q.shape[1] == seen[0][0].shape[1]
            qkv = seen[(step * branches) * 6 + layer]  # the branch with the prompt is the first
            for name, x in zip("qkv", qkv, strict=True):
                kept = getattr(one, name)
                assert kept.dtype == torch.bfloat16
                assert torch.equal(kept[0], x[0, :, 1].to(torch.bfloat16))


def test_the_run_says_that_it_is_dense(tmp_path: Path) -> None:
    told: list[str] = []
    listener = Listener()
    listener.begin = lambda arm, steps: told.append(arm)  # type: ignore[method-assign]
    capture(Request(**SMALL), Wanted((0,), (0,), (0,)), tmp_path, listener)
    assert told == ["dense"]


def test_only_what_is_missing_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = files.file_of(folder, 1, 5)
    times = {path.name: path.stat().st_mtime_ns for path in files.captures(folder)}
    before = lost.read_bytes()
    lost.unlink()
    made = capture(Request(**SMALL), WANTED, folder)
    assert made["made"] == 1 and lost.read_bytes() == before
    del times[lost.name]
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}
    monkeypatch.setattr(capturing, "_run", lambda *given: pytest.fail("nothing is missing"))
    assert capture(Request(**SMALL), WANTED, folder)["made"] == 0


def test_a_run_ends_with_the_last_call_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stock = capturing.Recorder.__call__

    def watched(self: capturing.Recorder, call: Any) -> None:
        seen.append(call.context.step)
        stock(self, call)

    monkeypatch.setattr(capturing.Recorder, "__call__", watched)
    capture(Request(**SMALL), Wanted((0,), (2,), (0,)), tmp_path)
    assert set(seen) == {0} and len(seen) == 3


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    for wanted, said in (
        (Wanted(steps=(3,)), "--step 3: there are 3; allowed: 0 .. 2"),
        (Wanted(layers=(6,)), "--layer 6: there are 6"),
        (Wanted(heads=(-1,)), "--head -1: there are 2"),
        (Wanted((1,), (0,), (0,)), r"other heads than \[0\]"),
    ):
        with pytest.raises(InputError, match=said):
            capture(Request(**SMALL), wanted, folder)
    with pytest.raises(InputError, match="holds captures of another run"):
        capture(Request(**{**SMALL, "seed": 1}), WANTED, folder)
    broken = files.file_of(tmp_path, 1, 0)
    broken.write_bytes(files.file_of(folder, 1, 0).read_bytes()[:1000])
    with pytest.raises(InputError, match="no whole capture"):
        capture(Request(**SMALL), WANTED, tmp_path)


@pytest.mark.parametrize("name", "qkv")
def test_what_is_no_capture_of_its_own_heads_and_tokens_is_refused(
    name: str, folder: Path, tmp_path: Path
) -> None:
    whole = files.read(files.file_of(folder, 1, 0))
    q, k, v = (getattr(whole, one) for one in "qkv")
    part = {one: x[:, :-1] for one, x in zip("qkv", (q, k, v), strict=True)}
    short = {"q": q, "k": k, "v": v, name: part[name]}
    with pytest.raises(ValueError, match=f"no whole capture, {name} is .*capture again"):
        files.read(files.write(tmp_path, whole.about, **short))
    for value in (float("nan"), float("inf")):
        broken = {"q": q, "k": k, "v": v, name: torch.full_like(q, value)}
        with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
            files.read(files.write(tmp_path, whole.about, **broken))


def test_a_full_disk_is_seen_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(capturing.shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"GiB are needed and 0\.0 free"):
        capture(Request(**SMALL), WANTED, tmp_path)


def test_choices_are_spread() -> None:
    assert chosen("--step", (), 20, 3, skip=1) == (4, 10, 16)
    assert chosen("--layer", (), 6, 4) == (0, 2, 3, 5) and chosen("--layer", (), 2, 4) == (0, 1)
    assert chosen("--step", (), 1, 3, skip=1) == (0,)
    assert chosen("--head", (3, 1, 3), 4, 4) == (1, 3)


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["-o", ""], ["--step", "99"]])
def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, wrong: list[str]) -> None:
    found = CliRunner().invoke(app, ["capture", "-o", str(tmp_path), *wrong])
    assert found.exit_code == 2
    said = [line for line in found.stderr.splitlines() if line.startswith("vidsparse: ")]
    assert len(said) == 1 and wrong[0].replace("-o", "--out") in said[0]
