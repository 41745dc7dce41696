"""What the cards say: settings that the pipelines take, sizes that their parts take, methods."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import combinations
from pathlib import Path

import diffusers
import pytest
import yaml
from checkpoints import files, published

from vidsparse.config import SparseConfig
from vidsparse.generate.cards import cards, plain_fact

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = published()
CARDS = {card.name: card for card in cards()}
KINDS = {
    **{"height": int, "width": int, "frames": int, "fps": int, "steps": int},
    **{"guidance": float, "guidance_2": float, "flow_shift": float},
    **{"negative_prompt": str, "dtype": str},
}
TAKEN_AS = {
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale", "true_cfg_scale"),
    "guidance_2": ("guidance_scale_2",),
    "negative_prompt": ("negative_prompt",),
    "frames": ("num_frames",),
    "height": ("height",),
    "width": ("width",),
}
SHRINKS = {
    # autoencoder -> frames and pixels of a side per latent, as its class or the pipelines say
    "AutoencoderKL": lambda c: (1, 2 ** (len(c["block_out_channels"]) - 1)),
    "AutoencoderKLAllegro": lambda c: (c["temporal_compression_ratio"], 8),
    "AutoencoderKLCogVideoX": lambda c: (c["temporal_compression_ratio"], 8),
    "AutoencoderKLFlux2": lambda c: (1, 2 ** (len(c["block_out_channels"]) - 1)),
    "AutoencoderKLHunyuanImage": lambda c: (1, c["spatial_compression_ratio"]),
    "AutoencoderKLMochi": lambda c: (6, 8),
    "AutoencoderKLQwenImage": lambda c: (1, 2 ** len(c["temperal_downsample"])),
    "AutoencoderKLWan": lambda c: (c["scale_factor_temporal"], c["scale_factor_spatial"]),
}
PACKED = {"FluxTransformer2DModel", "Flux2Transformer2DModel"}
"""Transformers whose pipelines make a token of 2 x 2 latents."""


def apart(one, other):
    """A fact on which two cards disagree: then no config fits both."""
    return [
        (file, key)
        for file, facts in one.facts.items()
        for key, value in facts.items()
        if key in other.facts.get(file, {})
        and plain_fact(other.facts[file][key]) != plain_fact(value)
    ]


def test_no_config_fits_two_cards():
    assert len(CARDS) == len(list((ROOT / "configs/models").glob("*.yaml"))) > 24
    for one, other in combinations(CARDS.values(), 2):
        assert apart(one, other), f"{one.name} and {other.name} can fit one config"


def test_each_checkpoint_has_one_card_and_each_card_is_proven():
    ids = [name for card in CARDS.values() for name in card.checkpoints]
    assert len(ids) == len(set(ids)) and set(ids) == set(PUBLISHED)
    assert [card.name for card in CARDS.values() if not card.checkpoints] == ["demo-wan"]


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_complete(name):
    card = CARDS[name]
    assert card.about.endswith(".") and len(card.prompts) > 3
    assert card.facts["transformer/config.json"]["_class_name"]
    assert set(card.defaults) <= set(KINDS)
    for key, value in card.defaults.items():
        assert type(value) is KINDS[key], key
    assert card.defaults.get("dtype") in (("bf16", "fp16") if card.checkpoints else (None,))
    assert card.defaults["steps"] > 0 and 0 <= card.defaults.get("guidance", 1) < 100


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_settings_are_what_the_pipeline_takes(checkpoint):
    defaults, pipeline = card_of(checkpoint).defaults, PUBLISHED[checkpoint]["pipeline"]
    takes = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    sizes = {"height", "width"} & set(takes)  # those of HunyuanVideo-1.5 follow the image
    for key in set(defaults) & set(TAKEN_AS) - ({"height", "width"} - sizes):
        assert any(name in takes for name in TAKEN_AS[key]), key
    assert ("frames" in defaults) == ("fps" in defaults) == ("num_frames" in takes)


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_sizes_are_whole_tokens(checkpoint):
    """By the configs of autoencoder and transformer."""
    content, entry = files(PUBLISHED[checkpoint]), PUBLISHED[checkpoint]
    time, side = shrinks(entry["vae"], content["vae/config.json"])
    patch = content["transformer/config.json"]["patch_size"]
    side *= patch[-1] if isinstance(patch, list) else patch
    side *= 2 if entry["transformer"] in PACKED else 1
    defaults = card_of(checkpoint).defaults
    assert defaults["height"] % side == defaults["width"] % side == 0
    if "frames" in defaults:
        alone = 0 if entry["vae"] == "AutoencoderKLAllegro" else 1  # the first frame, elsewhere
        assert (defaults["frames"] - alone) % time == 0


def shrinks(vae, config):
    if vae in SHRINKS:
        return SHRINKS[vae](config)
    if config["spatial_compression_ratio"] is None:  # of LTX
        halvings = sum(config["spatio_temporal_scaling"])
        return config["patch_size_t"] * 2**halvings, config["patch_size"] * 2**halvings
    return config["temporal_compression_ratio"], config["spatial_compression_ratio"]


@cache
def card_of(checkpoint):
    return next(card for card in CARDS.values() if checkpoint in card.checkpoints)


@pytest.mark.parametrize("name", CARDS)
def test_the_method_of_a_card_loads_and_says_where_it_is_from(name):
    preset = CARDS[name].preset
    plain, config = SparseConfig.load(preset.name), SparseConfig.load(preset.name, preset.overrides)
    assert (config == plain) == (not preset.overrides)
    assert name == "demo-wan" or preset.source.endswith("untested on real weights")
    steps = CARDS[name].defaults["steps"]
    assert len(config.dense_steps(steps)) <= max(1, 0.4 * steps)  # most of them are sparse


def test_shared_facts_stand_once():
    """Each long text, and each setting that a card or a family would only repeat."""
    texts = [p.read_text() for p in (ROOT / "configs").rglob("*.yaml")]
    assert sum("Bright tones, overexposed" in text for text in texts) == 1
    assert sum("A red fox runs" in text for text in texts) == 1
    read = {
        file: yaml.safe_load(file.read_text())
        for folder in ("models", "families")
        for file in (ROOT / "configs" / folder).glob("*.yaml")
    }
    for file, content in read.items():
        if "family" not in content:
            continue
        settings, preset = inherited(content["family"], read)
        repeated = (content.get("generate") or {}).items() & settings.items()
        assert not repeated, f"{file.name} repeats {repeated}"
        assert content.get("preset") != preset, file.name


def inherited(family, read):
    """Settings and preset of a family, by those that it names as its own."""
    content = read[ROOT / f"configs/families/{family}.yaml"]
    above = inherited(content["family"], read) if "family" in content else ({}, None)
    return {**above[0], **content.get("generate", {})}, content.get("preset") or above[1]


def test_families_are_used():
    used = {
        yaml.safe_load(file.read_text()).get("family")
        for folder in ("models", "families")
        for file in (ROOT / "configs" / folder).glob("*.yaml")
    }
    assert used - {None} == {file.stem for file in (ROOT / "configs/families").glob("*.yaml")}


@pytest.mark.parametrize(
    ("short", "pipeline"),
    [("Wan2.1-T2V-1.3B-Diffusers", "wan/pipeline_wan.py"), ("LTX-2", "ltx2/pipeline_ltx2.py")],
)
def test_the_negative_prompt_is_that_of_diffusers(short, pipeline):
    source = Path(diffusers.__file__).parent / "pipelines" / pipeline
    assert f'negative_prompt = "{CARDS[short].defaults["negative_prompt"]}"' in source.read_text()
