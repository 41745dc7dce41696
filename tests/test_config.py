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
    assert {"quality", "balanced", "fast", "tiles"} <= set(presets())


def test_overrides_apply_in_order_and_keep_the_rest():
    config = SparseConfig.load("tiles", ["schedule.density=0.15", "layout.tile=[1,4,4]"])
    assert config.schedule.density == 0.15
    assert config.layout.tile == (1, 4, 4)
    assert config.selector == SparseConfig.load("tiles").selector
    other = config.override("selector.name=topp", "selector.p=0.5")
    assert other.selector.p == 0.5 and other.schedule.density == 0.15


def test_an_override_may_change_the_method_and_keeps_what_both_know():
    config = SparseConfig.load("tiles", ["layout.name=hilbert", "schedule.name=ramp"])
    assert config.layout.name == "hilbert"
    assert config.schedule.name == "ramp" and config.schedule.density == 0.25
    with pytest.raises(ValueError, match=r"layout key='tile'"):
        SparseConfig.load("tiles", ["layout.name=hilbert", "layout.tile=[1,8,8]"])


def test_a_float_and_an_integer_are_different_dense_steps():
    assert SparseConfig.load("tiles", ["schedule.dense_steps=3"]).schedule.dense_steps == 3
    part = SparseConfig.load("tiles", ["schedule.dense_steps=0.3"]).schedule.dense_steps
    assert part == 0.3 and isinstance(part, float)


BAD = [
    ("schedule.density=0", r"schedule.density=0.0: allowed is a number in \(0, 1\]"),
    ("schedule.density=1.5", r"schedule.density=1.5: allowed is a number in \(0, 1\]"),
    ("schedule.density=lots", r"schedule.density='lots': allowed is a number"),
    ("schedule.densty=0.2", r"schedule key='densty': allowed is .*density"),
    ("schedul.density=0.2", "section='schedul': allowed is layout, pattern, estimator"),
    (
        "selector.name=magic",
        "selector.name='magic': no such method; there are .*pyramid, .*threshold",
    ),
    ("layout.tile=[2,0,8]", "layout.tile=.*three integers >= 1"),
    ("layout.tile=[2,8]", "layout.tile="),
    ("kernel.block_k=48", r"kernel.block_k=48: allowed is a power of two, 16 \.\. 512"),
    ("kernel.impl=cuda", "kernel.impl='cuda': allowed is auto, cpu, reference, triton"),
    ("schedule.dense_steps=1.5", r"schedule.dense_steps=1.5: allowed is a fraction in \[0, 1\)"),
    ("schedule.dense_steps=-1", "schedule.dense_steps=-1"),
    ("density", "override='density': allowed is section.key=value"),
    ("force.text=perhaps", "force.text='perhaps'"),
    ("selector.min_blocks=0", "selector.min_blocks=0: allowed is an integer >= 1"),
    ("selector.min_blocks=9223372036854775808", "selector.min_blocks=.*: allowed is an integer"),
    ("selector.min_blocks=true", "selector.min_blocks=True: allowed is an integer"),
    ("schedule.min_tokens=8.0", r"schedule.min_tokens=8.0: allowed is an integer"),
    ("schedule.density=", "schedule.density has no value: allowed is a number"),
    ("schedule.density=nan", "schedule.density='nan': allowed is a number"),
    ("schedule.density={a: 1}", "schedule.density={'a': 1}: allowed is a number"),
    ("schedule.density.x=1", "schedule key='density.x': allowed is"),
    ("schedule.dense_layers=1", "schedule.dense_layers=1: allowed is a list of integers"),
    ("schedule.dense_layers=[1.5]", r"schedule.dense_layers\[0\]=1.5: allowed is an integer"),
    ("layout.tile[0]=3", r"layout key='tile\[0\]': allowed is"),
    ("layout.tile=[9999,9999,9999]", "layout.tile=.*a product of at most 1,048,576"),
    ("selector.name=3", "selector.name=3: allowed is the name of a method"),
    ("force.text=2", "force.text=2: allowed is true or false"),
    ("schedule=0.2", "override='schedule=0.2': allowed is section.key=value"),
    ("about=x", "override='about=x': allowed is section.key=value"),
    ("about.x=1", "section='about': allowed is layout, .*kernel, keep$"),
    ("=", "override='=': allowed is section.key=value"),
    ("=1", "override='=1': allowed is section.key=value"),
    (".density=1", "override='.density=1': allowed is section.key=value"),
    ("schedule.=1", "override='schedule.=1': allowed is section.key=value"),
    ("", "override='': allowed is section.key=value"),
    ("schedule.density=[0.2", r"override 'schedule.density=\[0.2', line 1 is not valid YAML"),
    ("schedule.density=!!float 0.2", "override .*the tag"),
    ("schedule.sparsity=1", r"schedule.sparsity=1.0: allowed is a number in \[0, 1\)"),
    ("schedule.sparsity=-0.1", "schedule.sparsity=-0.1: allowed is"),
    ("schedule.sparsity=most", "schedule.sparsity='most': allowed is a number"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_settings_name_key_value_and_what_is_allowed(override, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig.load("tiles", [override])


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
    with pytest.raises(TypeError, match="preset is None"):
        SparseConfig.load(None)
    for values in (None, [], "fast", 3):
        with pytest.raises(TypeError, match=r"settings are .*expected a dict"):
            SparseConfig.from_dict(values)


def test_named_configs_are_kept_until_the_file_changes(tmp_path):
    assert resolve("fast") is resolve("fast")
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: {density: 0.5}")
    assert resolve(path) is resolve(path)
    path.write_text("schedule: {density: 0.125}")
    assert resolve(path).schedule.density == 0.125
    assert resolve(str(path)) == resolve(path)


def test_overrides_are_strings_one_or_many():
    wanted = SparseConfig.load("tiles", ["schedule.density=0.1"])
    one = "schedule.density=0.1"
    for given in (one, (one,), iter([one]), {one}, [" schedule.density = '0.1' "]):
        assert SparseConfig.load("tiles", given) == wanted
    assert resolve("tiles", one) == resolve(SparseConfig.load("tiles"), one) == wanted
    assert SparseConfig.load("tiles", None) == SparseConfig.load("tiles")
    assert SparseConfig.load("tiles", ["schedule.density=0.9", one]) == wanted
    for bad, said in (
        (3, "overrides are a int"),
        (b"schedule.density=0.1", "overrides are a bytes"),
        ({"schedule.density": 0.1}, "overrides are a dict"),
        ([0.1], "override 0.1 is a float"),
        ([one, None], "override None is None"),
        ([[one]], "is a list"),
    ):
        with pytest.raises(TypeError, match=said):
            SparseConfig.load("tiles", bad)
        with pytest.raises(TypeError, match=said):
            resolve(SparseConfig.load("tiles"), bad)


def test_sections_are_mappings_and_about_is_text():
    for section in (3, "tile", [], False, 0, ""):
        with pytest.raises(ValueError, match=r"layout=.*: allowed is a mapping"):
            SparseConfig.from_dict({"layout": section})
    assert SparseConfig.from_dict({"layout": None}) == SparseConfig.from_dict({})
    for about in (3, ["x"], True):
        with pytest.raises(ValueError, match=r"about=.*: allowed is text"):
            SparseConfig.from_dict({"about": about})


def test_settings_of_a_method_that_an_override_replaces_are_checked_too():
    with pytest.raises(ValueError, match="layout key='tyle'"):
        SparseConfig.from_dict({"layout": {"name": "tile", "tyle": 3}}, "layout.name=hilbert")


def test_a_selector_reads_no_coarser_than_a_block():
    levels = {"selector": {"name": "pyramid", "levels": [0, 6]}, "kernel": {"block_k": 64}}
    assert SparseConfig.from_dict(levels).selector.levels == (0, 6)
    with pytest.raises(ValueError, match=r"selector.levels=\(0, 6\): allowed is .* at most 5"):
        SparseConfig.from_dict(levels, "kernel.block_k=32")


# 1 - x in decimal, which binary subtraction misses for most
SPARSITIES = {0.75: 0.25, 0.9: 0.1, 0.8: 0.2, 0.7: 0.3, 0.95: 0.05, 0.999: 0.001, 0: 1.0}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparsity_says_density(sparsity, tmp_path):
    density = SPARSITIES[sparsity]
    for config in (
        SparseConfig.load("tiles", f"schedule.sparsity={sparsity}"),
        SparseConfig.from_dict({"schedule": {"sparsity": sparsity}}),
        SparseConfig.from_dict({"schedule": {"sparsity": 0.5}}, f"schedule.sparsity={sparsity}"),
        SparseConfig.from_dict({"schedule": {"density": 0.5}}, f"schedule.sparsity={sparsity}"),
        SparseConfig.load("tiles", ["schedule.name=ramp", f"schedule.sparsity={sparsity}"]),
    ):
        assert config.schedule.density == density
        assert "sparsity" not in config.to_yaml() and f"density: {density}" in config.to_yaml()
        assert SparseConfig.from_dict(config.to_dict()) == config


def test_sparsity_and_density_are_one_thing():
    base = {"schedule": {"sparsity": 0.75}}
    assert SparseConfig.from_dict(base, "schedule.density=0.5").schedule.density == 0.5
    assert SparseConfig.from_dict(base, "schedule.name=ramp").schedule.density == 0.25
    with pytest.raises(ValueError, match=r"schedule.sparsity=0.75 beside schedule.density=0.25"):
        SparseConfig.from_dict({"schedule": {"sparsity": 0.75, "density": 0.25}})
    with pytest.raises(ValueError, match="both say the same"):
        SparseConfig.load("tiles", ["schedule.sparsity=0.75", "schedule.density=0.25"])
    with pytest.raises(ValueError, match=r"schedule key='sparsty': allowed is .*sparsity"):
        SparseConfig.load("tiles", "schedule.sparsty=0.75")


@pytest.mark.parametrize("stage", registry.STAGES)
def test_a_method_is_a_file_whose_name_it_bears(stage):
    for name in registry.methods(stage):
        assert registry.method(stage, name).Params().name == name
