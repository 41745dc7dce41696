"""Configs: presets load, round-trip, and refuse what they do not know with a message that helps."""

import pytest

from vidsparse import registry
from vidsparse.config import SparseConfig, presets, resolve


@pytest.mark.parametrize("name", presets())
def test_presets_load_round_trip_and_say_what_they_are(name, tmp_path):
    config = SparseConfig.load(name)
    assert 10 < len(config.about) < 110
    assert SparseConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml())
    assert SparseConfig.load(path) == config
    assert hash(config.layout) is not None


def test_the_three_levels_of_quality_are_shipped():
    assert {"quality", "balanced", "fast"} <= set(presets())


def test_overrides_apply_in_order_and_keep_the_rest():
    config = SparseConfig.load("balanced", ["schedule.density=0.15", "layout.tile=[1,4,4]"])
    assert config.schedule.density == 0.15
    assert config.layout.tile == (1, 4, 4)
    assert config.selector == SparseConfig.load("balanced").selector
    other = config.override("selector.name=topp", "selector.p=0.5")
    assert other.selector.p == 0.5 and other.schedule.density == 0.15


def test_an_override_may_change_the_method_and_keeps_what_both_know():
    config = SparseConfig.load("balanced", ["layout.name=hilbert", "schedule.name=ramp"])
    assert config.layout.name == "hilbert"
    assert config.schedule.name == "ramp" and config.schedule.density == 0.25
    with pytest.raises(ValueError, match=r"layout key='tile'"):
        SparseConfig.load("balanced", ["layout.name=hilbert", "layout.tile=[1,8,8]"])


def test_a_float_and_an_integer_are_different_dense_steps():
    assert SparseConfig.load("balanced", ["schedule.dense_steps=3"]).schedule.dense_steps == 3
    part = SparseConfig.load("balanced", ["schedule.dense_steps=0.3"]).schedule.dense_steps
    assert part == 0.3 and isinstance(part, float)


BAD = [
    ("schedule.density=0", r"schedule.density=0.0: allowed is a number in \(0, 1\]"),
    ("schedule.density=1.5", r"schedule.density=1.5: allowed is a number in \(0, 1\]"),
    ("schedule.density=lots", r"schedule.density='lots'.*could not be converted to Float"),
    ("schedule.densty=0.2", r"schedule key='densty': allowed is .*density"),
    ("schedul.density=0.2", "section='schedul': allowed is layout, estimator"),
    ("selector.name=magic", "selector.name='magic': no such method; there are pyramid, threshold"),
    ("layout.tile=[2,0,8]", "layout.tile=.*three integers >= 1"),
    ("layout.tile=[2,8]", "layout.tile="),
    ("kernel.block_k=48", r"kernel.block_k=48: allowed is a power of two, 16 \.\. 512"),
    ("kernel.impl=cuda", "kernel.impl='cuda': allowed is auto, reference, cpu, triton"),
    ("schedule.dense_steps=1.5", r"schedule.dense_steps=1.5: allowed is a fraction in \[0, 1\)"),
    ("schedule.dense_steps=-1", "schedule.dense_steps=-1"),
    ("density", "override='density': allowed is section.key=value"),
    ("force.text=perhaps", "force.text='perhaps'"),
    ("selector.min_blocks=0", "selector.min_blocks=0: allowed is an integer >= 1"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_settings_name_key_value_and_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig.load("balanced", [override])


PYRAMID = [
    ("levels: [1, 2]", "selector.levels"),
    ("levels: [0, 3, 2]", "selector.levels"),
    ("shares: [0.5, 0.4]", "2 positive numbers .one per level., sum 1"),
    ("mode: rank", "selector.mode='rank': allowed is quota, mass"),
    ("mode: mass, mass: [0.9, 0.5]", "2 ascending numbers"),
]


@pytest.mark.parametrize(("text", "message"), PYRAMID, ids=[p[0] for p in PYRAMID])
def test_bad_pyramids(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"selector: {{name: pyramid, {text}}}")
    with pytest.raises(ValueError, match=message):
        SparseConfig.load(path)


def test_unknown_presets_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"preset 'best': no such preset; there are .*balanced"):
        SparseConfig.load("best")
    with pytest.raises(ValueError, match="does not exist"):
        SparseConfig.load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ValueError, match="not valid YAML"):
        SparseConfig.load(broken)
    broken.write_text("force: 3")
    with pytest.raises(ValueError, match="force=3: allowed is a mapping"):
        SparseConfig.load(broken)
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="expected sections"):
        SparseConfig.load(broken)


def test_resolve_takes_what_users_pass():
    config = SparseConfig.load("fast")
    assert resolve("fast") == resolve(config) == resolve(config.to_dict()) == config
    assert resolve(config, ["schedule.density=0.3"]).schedule.density == 0.3
    with pytest.raises(TypeError, match="preset is a int"):
        resolve(3)


@pytest.mark.parametrize("stage", registry.STAGES)
def test_a_method_is_a_file_whose_name_it_bears(stage):
    for name in registry.methods(stage):
        assert registry.method(stage, name).Params().name == name
