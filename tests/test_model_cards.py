"""Checkpoints are recognised by their configs: never by a folder's name, never two at once."""

import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from checkpoints import INDEX, files, published, write

from vidsparse.generate import cards as catalogue
from vidsparse.generate import run as runs
from vidsparse.generate.cards import cards, recognise
from vidsparse.generate.job import prepare
from vidsparse.generate.model import find_model
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.shipped import demo_model

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = published()
WAN = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize("checkpoint", PUBLISHED)
@pytest.mark.parametrize("young", [True, False], ids=["all keys", "only what is on"])
def test_published_checkpoints_are_recognised(checkpoint, young):
    card = recognise(files(PUBLISHED[checkpoint], young))
    assert card is not None and checkpoint in card.checkpoints


@pytest.mark.parametrize("name", ["3f2a9c0d", "wan"])
@pytest.mark.parametrize("short", ["Wan2.1-T2V-14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"])
def test_the_name_of_the_folder_does_not_matter(tmp_path, short, name):
    checkpoint = f"Wan-AI/{short}"
    model = find_model(str(write(tmp_path / name, PUBLISHED[checkpoint])) + "/")
    assert model.card is not None and model.card.name == short
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name)
    assert find_model(str(link)).card == model.card


def test_5b_under_a_snapshot_hash_gets_its_own_size(tmp_path):
    folder = tmp_path / "models--Wan-AI--Wan2.2-TI2V-5B-Diffusers" / "snapshots" / "b8fff7315c"
    model = find_model(str(write(folder, PUBLISHED["Wan-AI/Wan2.2-TI2V-5B-Diffusers"])))
    assert model.name == "Wan2.2-TI2V-5B-Diffusers"
    wanted = {"height": 704, "width": 1280, "frames": 121, "fps": 24, "steps": 50}
    assert {key: model.defaults[key] for key in wanted} == wanted


def test_a_folder_name_alone_gives_no_defaults(tmp_path):
    folder = tmp_path / "Wan2.2-TI2V-5B-Diffusers"
    tiny.build("wan", rope_max_seq_len=64)[0].save_pretrained(folder)
    job = prepare(Request(model=str(folder), prompt="a cat", height=480))
    assert job.model.card is None and job.call["num_frames"] == 81 and job.fps == 16
    (note,) = job.notes
    assert "generic defaults for fps, width, frames, steps, guidance" in note
    assert "WanPipeline" in note


def test_defaults_come_from_the_card_and_the_note_says_so(tmp_path):
    shutil.copytree(demo_model(), tmp_path / "mine")
    job = prepare(Request(model=str(tmp_path / "mine"), seed=2, steps=7))
    card = yaml.safe_load((ROOT / "configs/models/demo-wan.yaml").read_text())
    assert job.prompt == card["prompts"][2] and job.fps == card["generate"]["fps"]
    assert (job.call["height"], job.call["num_inference_steps"]) == (96, 7)
    assert job.notes == ("note: mine has the config of demo-wan, and gets its defaults",)


def test_the_model_of_a_card_is_taken_without_a_note():
    assert prepare(Request()).notes == ()


def test_notes_are_said_before_the_model_is_loaded(tmp_path):
    class Stop(Exception):
        pass

    class Listening(runs.Listener):
        def say(self, text):
            said.append(text)
            if text.startswith("loading"):
                raise Stop

    said = []
    shutil.copytree(demo_model(), tmp_path / "mine")
    job = prepare(Request(model=str(tmp_path / "mine")))
    with pytest.raises(Stop):
        runs.load(job, Listening())
    assert said == [*job.notes, "loading mine"]


def test_ambiguous_cards_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "families").mkdir()
    text = "about: a\nfacts: {model_index.json: {transformer: null}}\ngenerate: {fps: 1}\n"
    for name in ("a", "b"):
        (tmp_path / "models" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(catalogue, "folder", lambda name: tmp_path / name.partition("/")[2])
    assert {card.name for card in cards()} == {"a", "b"}
    with pytest.raises(AssertionError, match="ambiguous"):
        recognise({INDEX: {"transformer": [None, None]}})
    assert recognise({INDEX: {"transformer": WAN}}) is None


def test_missing_cards_say_the_cure(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"{name} is missing: reinstall vidsparse")

    monkeypatch.setattr(catalogue, "folder", missing)
    with pytest.raises(InputError, match="reinstall"):
        find_model(str(demo_model()))


def test_a_card_is_read_as_settings_are(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text('about: "${oc.env:HOME}"\nfacts: {}\ngenerate: {}\n')
    with pytest.raises(ValueError, match=r"card.yaml': about=.* asks for interpolation"):
        catalogue.read_card(card, tmp_path)
