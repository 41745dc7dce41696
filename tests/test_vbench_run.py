"""`vidsparse vbench run` on a small package that behaves as VBench is described to."""

import json
import os
import sys
from pathlib import Path

import pytest

from vidsparse.vbench.run import Request, run

TORCH = """
class library:
    @staticmethod
    def register_fake(name, *args, **options):
        raise RuntimeError(f"operator {name} does not exist")
class ops:
    class torchvision: pass
"""
UTILS = """
import torch
@torch.library.register_fake("torchvision::nms")
def fake(*args): pass
"""
VBENCH = """
import json, os, sys
class VBench:
    def __init__(self, device, full_info, out):
        self.out = out
        self.facts = {"device": device, "full_info": os.path.basename(full_info)}
        self.facts["paths"] = sys.path
    def evaluate(self, videos_path, name, prompt_list, dimension_list, mode, local):
        print("judging", name)
        if "scene" in dimension_list:
            import detectron2_of_vbench
        if "color" in dimension_list:
            raise AssertionError("no clip\\nat all")
        clips = [{"video_path": os.path.join(videos_path, f), "video_results": 0.5}
                 for f in os.listdir(videos_path)]
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as file:
            json.dump({d: [0.5, clips] for d in dimension_list}, file)
        self.facts.update(prompts=prompt_list, mode=mode, local=local)
        with open(os.environ["FACTS"], "w") as file:
            json.dump(self.facts, file)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The Python of it; its torch refuses fakes of operators that are not there."""
    packages = tmp_path / "packages"
    (packages / "vbench").mkdir(parents=True)
    (packages / "torch.py").write_text(TORCH)
    (packages / "vbench" / "__init__.py").write_text(VBENCH)
    (packages / "vbench" / "utils.py").write_text(UTILS)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("FACTS", str(tmp_path / "facts.json"))
    return Path(sys.executable)


@pytest.fixture
def arm(tmp_path):
    """An arm of an export with a prompt that a shell would break."""
    arm = tmp_path / "it's $HOME `x`"
    (arm / "videos").mkdir(parents=True)
    (arm / "videos" / "a-0.mp4").touch()
    (arm / "prompts.json").write_text(json.dumps({"a-0.mp4": 'say "$(hi)"'}))
    return arm


def test_it_is_called_by_its_python_interface(environment, arm, tmp_path, capfd):
    (file,) = run(Request(environment, arm, tmp_path / "out", ("dynamic_degree",), "cpu"))
    assert list(json.loads(file.read_text())) == ["dynamic_degree"]
    assert os.listdir(tmp_path / "out") == [file.name] == ["it-s-home-x_eval_results.json"]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["prompts"] == {"a-0.mp4": 'say "$(hi)"'}
    assert (facts["device"], facts["mode"], facts["local"]) == ("cpu", "custom_input", True)
    assert facts["full_info"] == "VBench_full_info.json"
    assert not any("vidsparse/vbench" in path for path in facts["paths"])
    said = capfd.readouterr()
    assert "judging it-s-home-x" in said.err and not said.out


def test_what_is_missing_is_named_with_the_way_to_set_it_up(environment, arm, tmp_path):
    request = Request(environment, arm, tmp_path / "out", ("scene",), custom=False)
    with pytest.raises(ValueError, match=r"lacks detectron2_of_vbench .*; VBench needs an env"):
        run(request)
    assert os.listdir(tmp_path / "out") == []
    (tmp_path / "packages" / "vbench" / "utils.py").write_text("import decord_of_vbench")
    with pytest.raises(ValueError, match=r"lacks decord_of_vbench .*pip install vbench==0\.1\.5"):
        run(request)
    (tmp_path / "packages" / "vbench" / "utils.py").write_text("raise RuntimeError('too new')")
    with pytest.raises(ValueError, match="cannot import VBench: RuntimeError: too new"):
        run(request)


def test_a_vbench_that_fails_says_why(environment, arm, tmp_path, capfd):
    with pytest.raises(ValueError, match="VBench failed: AssertionError: no clip"):
        run(Request(environment, arm, tmp_path / "out", ("color",), custom=False))
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"python": Path("/bin/false")}, "ended with code 1, and is no Python"),
        ({"python": Path("no-such-python")}, "is no program that can be run"),
        ({"videos": Path("nowhere")}, "is no folder"),
        ({"out": Path("/dev/null/out")}, "--out /dev/null/out: no folder can be made there"),
        ({"dimensions": ("speed",)}, "there are subject_consistency"),
        ({"dimensions": ("color",)}, "needs VBench's own prompts"),
    ],
)
def test_mistakes_are_found_before_anything_runs(environment, arm, tmp_path, changes, why):
    request = {"python": environment, "videos": arm, "out": tmp_path / "out", **changes}
    with pytest.raises(ValueError, match=why):
        run(Request(**request))
    assert not (tmp_path / "out").exists()


def test_files_that_mislead_vbench_are_refused(environment, arm, tmp_path):
    (arm / "videos" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt: VBench takes the first file's suffix"):
        run(Request(environment, arm, tmp_path / "out", custom=False))
    (arm / "videos" / "b.mp4").touch()
    with pytest.raises(ValueError, match=r"has no prompt for b\.mp4"):
        run(Request(environment, arm, tmp_path / "out"))
    for file in (arm / "videos").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="holds no clip"):
        run(Request(environment, arm, tmp_path / "out"))
