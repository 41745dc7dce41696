"""Checkpoints are recognised by their configs: never by a folder's name, never two at once."""

import inspect
import json
import shutil
from itertools import combinations
from pathlib import Path

import diffusers
import pytest
import tiny
import yaml

from vidsparse.generate import cards as catalogue
from vidsparse.generate import run as runs
from vidsparse.generate.cards import cards, recognise
from vidsparse.generate.job import Request, prepare
from vidsparse.generate.model import Model, check_size, find_model
from vidsparse.generate.model_files import INDEX, InputError
from vidsparse.shipped import demo_model

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"height", "width", "frames", "steps", "guidance", "fps", "negative_prompt"}

WAN = ["diffusers", "WanTransformer3DModel"]
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
SMALL = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
PUBLISHED = {
    # checkpoint -> card, pipeline, keys of model_index.json, of the transformer (beside the
    # defaults of its class), of the autoencoder; from convert_wan_to_diffusers.py of diffusers
    "Wan2.1-T2V-1.3B-Diffusers": ("Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", {}, SMALL, 8),
    "Wan2.1-T2V-14B-Diffusers": ("Wan2.1-T2V-14B-Diffusers", "WanPipeline", {}, {}, 8),
    "Wan2.1-I2V-14B-480P-Diffusers": (
        "Wan2.1-I2V-14B-Diffusers",
        "WanImageToVideoPipeline",
        {},
        IMAGE,
        8,
    ),
    "Wan2.1-I2V-14B-720P-Diffusers": (
        "Wan2.1-I2V-14B-Diffusers",
        "WanImageToVideoPipeline",
        {},
        IMAGE,
        8,
    ),
    "Wan2.1-FLF2V-14B-720P-diffusers": (
        "Wan2.1-FLF2V-14B-720P-diffusers",
        "WanImageToVideoPipeline",
        {},
        {**IMAGE, "pos_embed_seq_len": 514},
        8,
    ),
    "Wan2.2-T2V-A14B-Diffusers": (
        "Wan2.2-T2V-A14B-Diffusers",
        "WanPipeline",
        {"transformer_2": WAN, "boundary_ratio": 0.875},
        {},
        8,
    ),
    "Wan2.2-I2V-A14B-Diffusers": (
        "Wan2.2-I2V-A14B-Diffusers",
        "WanImageToVideoPipeline",
        {"transformer_2": WAN, "boundary_ratio": 0.9},
        {"in_channels": 36},
        8,
    ),
    "Wan2.2-TI2V-5B-Diffusers": (
        "Wan2.2-TI2V-5B-Diffusers",
        "WanPipeline",
        {"expand_timesteps": True},
        {
            "num_layers": 30,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
        16,
    ),
}


def write(folder, checkpoint):
    """The small files of a published checkpoint, as save_pretrained writes them."""
    _, pipeline, index, transformer, spatial = PUBLISHED[checkpoint]
    parameters = inspect.signature(diffusers.WanTransformer3DModel).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    content = {"_class_name": WAN[1], **defaults, **transformer}
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "scale_factor_spatial": spatial}
    index = {
        "_class_name": pipeline,
        "transformer": WAN,
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "boundary_ratio": None,
        **index,
    }
    files = {
        INDEX: index,
        "transformer/config.json": content,
        "transformer_2/config.json": content,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": {"num_train_timesteps": 1000},
        "text_encoder/config.json": {"d_model": 4096},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("checkpoint", PUBLISHED)
@pytest.mark.parametrize("name", ["3f2a9c0d", "wan"])
def test_published_checkpoints_are_recognised_under_any_name(tmp_path, checkpoint, name):
    model = find_model(str(write(tmp_path / name, checkpoint)) + "/")
    assert model.card is not None and model.card.name == PUBLISHED[checkpoint][0]
    assert any(path.endswith(f"/{checkpoint}") for path in model.card.checkpoints)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name)
    assert find_model(str(link)).card == model.card


def test_5b_under_a_snapshot_hash_gets_its_own_size(tmp_path):
    folder = tmp_path / "models--Wan-AI--Wan2.2-TI2V-5B-Diffusers" / "snapshots" / "b8fff7315c"
    model = find_model(str(write(folder, "Wan2.2-TI2V-5B-Diffusers")))
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


def apart(one, other):
    """A fact on which two cards disagree: then no config fits both."""
    return [
        (file, key)
        for file, facts in one.facts.items()
        for key, value in facts.items()
        if key in other.facts.get(file, {}) and other.facts[file][key] != value
    ]


def test_no_config_fits_two_cards():
    shipped = cards()
    assert len(shipped) == len(list((ROOT / "configs/models").glob("*.yaml"))) > 7
    for one, other in combinations(shipped, 2):
        assert apart(one, other), f"{one.name} and {other.name} can fit one config"
    ids = [name for card in shipped for name in card.checkpoints]
    assert len(ids) == len(set(ids))


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


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_cards_are_complete_and_fit_their_models(card):
    assert card.about and card.prompts
    assert set(card.defaults) - {"guidance_2"} == SETTINGS
    spatial = 16 if "5B" in card.name else 8
    files = {INDEX: {"transformer": WAN}, "transformer/config.json": {}}
    files["vae/config.json"] = {"scale_factor_spatial": spatial}
    size = [card.defaults[key] for key in ("height", "width", "frames")]
    assert check_size(Model("", "", files), *size) > 1000 or card.name == "demo-wan"


def test_shared_facts_stand_once():
    """Each long text, and each default of a family that a card would only repeat."""
    texts = [p.read_text() for p in (ROOT / "configs").rglob("*.yaml")]
    assert sum("overexposed" in text for text in texts) == 1
    assert sum("A red fox runs" in text for text in texts) == 1
    for file in (ROOT / "configs/models").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if "family" in content:
            family = yaml.safe_load(
                (ROOT / f"configs/families/{content['family']}.yaml").read_text()
            )
            repeated = content["generate"].items() & family["generate"].items()
            assert not repeated, f"{file.name} repeats {repeated}"


def test_the_negative_prompt_is_that_of_diffusers():
    source = Path(diffusers.__file__).parent / "pipelines" / "wan" / "pipeline_wan.py"
    card = next(card for card in cards() if card.name == "Wan2.1-T2V-1.3B-Diffusers")
    assert f'negative_prompt = "{card.defaults["negative_prompt"]}"' in source.read_text()


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
