"""What a file, a dict or an override may say: plain values, and nothing that reaches out."""

import math
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vidsparse.config import SparseConfig
from vidsparse.plain_values import MAX_BYTES, read, short

SECRET = "a-secret-of-the-environment"
REACHES = [
    "${oc.env:VIDSPARSE_SECRET}",
    "x ${oc.env:VIDSPARSE_SECRET,none} y",
    "${oc.decode:'0.2'}",
    "${schedule.density}",
    "${.density}",
    "${about}",
    "${a:${b:c}}",
    "${",
    "$${about}",
    "\\${about}",
]


def refused(make, key: str, *said: str) -> None:
    """A ValueError that names the key; the environment is not in it."""
    with pytest.raises(ValueError, match="asks for interpolation") as caught:
        make()
    for word in (key, *said):
        assert word in str(caught.value), (word, str(caught.value))
    assert SECRET not in str(caught.value)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("VIDSPARSE_SECRET", SECRET)


@pytest.mark.parametrize("text", REACHES)
def test_interpolation_is_refused_wherever_it_stands(text, tmp_path):
    places = {
        "about": {"about": text},
        "schedule.density": {"schedule": {"density": text}},
        "layout.tile[1]": {"layout": {"tile": [2, text, 8]}},
        "selector.name": {"selector": {"name": text}},
        "schedule": {"schedule": text},
        text: {text: {"density": 0.2}},
        f"schedule.{text}": {"schedule": {text: 0.2}},
    }
    for key, values in places.items():
        shown = key if len(key) < 40 and "\\" not in key else ""
        refused(lambda values=values: SparseConfig.from_dict(values), shown)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        refused(lambda path=path: SparseConfig.load(path), shown, "mine.yaml")
    for override in (f"schedule.density={text}", f"layout.tile=[2,{text!r},8]"):
        refused(lambda o=override: SparseConfig.load("tiles", [o]), "override", "${")
    for override in ("schedule.${about}=1", "${about}.density=1"):
        refused(lambda o=override: SparseConfig.load("tiles", [o]), "override")


@pytest.mark.parametrize("text", REACHES[:6])
def test_an_omegaconf_config_is_not_resolved(text):
    whole = OmegaConf.create({"about": text, "schedule": {"density": 0.2}})
    refused(lambda: SparseConfig.from_dict(whole), "about")
    part = {"schedule": OmegaConf.create({"density": text})}
    refused(lambda: SparseConfig.from_dict(part), "schedule.density")
    items = {"layout": {"tile": OmegaConf.create([2, text, 8])}}
    refused(lambda: SparseConfig.from_dict(items), "layout.tile[1]")
    plain = OmegaConf.create({"schedule": {"density": 0.2, "dense_layers": [1]}})
    assert SparseConfig.from_dict(plain).schedule.dense_layers == (1,)
    with pytest.raises(ValueError, match=r"schedule.density='\?\?\?': allowed is a number"):
        SparseConfig.from_dict(OmegaConf.create({"schedule": {"density": "???"}}))


LAUGHS = "\n".join(
    ["about: x", "a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30))]
)
FILES = {
    "python tag": (
        "about: !!python/object/apply:os.system [echo]",
        "line 1: the tag",
    ),
    "python name": ("about: !!python/name:os.system", "the tag"),
    "path tag": ("about: !!python/object/apply:pathlib.Path [x]", "the tag"),
    "own tag": ("about: !env HOME", r"the tag '!env'"),
    "standard tag": ("about: !!str x", "the tag"),
    "binary tag": ("about: !!binary aGk=", "the tag"),
    "anchor": ("schedule: &s {density: 0.2}", "line 1: anchors"),
    "alias": ("layout: &l {name: tile}\nforce: *l", "line 1: anchors"),
    "unknown alias": ("layout: *l", "anchors"),
    "merge": ("schedule: {<<: {density: 0.2}}", "line 1: a merge key"),
    "laughs": (LAUGHS, "line 2: anchors"),
    "twice": (
        "schedule: {density: 0.2, density: 0.3}",
        "line 1 is not valid YAML: found duplicate key density",
    ),
    "section twice": (
        "force: {text: true}\nforce: {text: no}",
        "line 2 is not valid YAML: found duplicate key force",
    ),
    "documents": ("about: a\n---\nabout: b", "line 2: a second document"),
    "tab": ("schedule:\n\tdensity: 0.2", "line 2 is not valid YAML"),
    "open": ("schedule: {density: 0.2", "not valid YAML"),
    "list key": ("? [a]\n: 1", "a list or mapping as key"),
    "null key": ("{~: 1}", "a key without a name"),
    "number key": ("schedule: {3: 1}", "key 3 in schedule: expected a name"),
    "truth as key": ("schedule: {yes: 1}", "key True in schedule: expected a name"),
    "many": ("layout: {tile: [" + "1," * 5000 + "]}", "more than 4,096 values"),
    "deep": ("a: " + "[" * 500 + "]" * 500, "nested deeper than 8"),
    "deep mappings": ("".join("\n" + " " * n + "a:" for n in range(200)), "nested deeper than 8"),
    "control": ("about: \x07", "not valid YAML"),
    "empty": ("", "expected sections, .* found nothing"),
    "comment": ("# about: x\n\n", "expected sections, .* found nothing"),
    "marker": ("---\n...\n", "found nothing"),
    "no section": ("{}", "expected sections"),
    "list": ("- schedule", "expected sections, .* found a list"),
    "word": ("tiles", "expected sections, .* found a str"),
    "number": ("3", "expected sections, .* found a int"),
    "json lines": ('{"about": "a"}\n{"about": "b"}', "not valid YAML"),
    "date": ("schedule: {density: 2024-99-99}", "schedule.density='2024-99-99': allowed is a num"),
    "sexagesimal": ("schedule: {min_tokens: 1:30}", "line 1: '1:30' is no plain number"),
    "digits": ("schedule: {min_tokens: " + "9" * 5000 + "}", "line 1: '9999.*' is no plain number"),
    "infinite": ("schedule: {density: .inf}", "schedule.density=inf: allowed is a number"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_says_plain_values_or_is_refused(case, tmp_path):
    text, said = FILES[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        SparseConfig.load(path)
    assert type(caught.value) is ValueError and len(str(caught.value)) < 600


def test_bytes_that_are_no_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    for data, said in (
        (b"about: \xff\xfe", "not UTF-8"),
        ("about: x".encode("utf-16"), "not UTF-8"),
        (b"about: x\n" + b"#" * MAX_BYTES, "more than 65,536 bytes"),
        (b"about: \x00", "not valid YAML"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            SparseConfig.load(path)
    path.write_bytes(b"\xef\xbb\xbfabout: x")  # the mark that editors on Windows write
    assert SparseConfig.load(path).about == "x"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="more than 65,536 bytes"):
        SparseConfig.load(path)
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder.yaml' is a directory"):
        SparseConfig.load(folder)
    for name in ("a\0.yaml", "x" * 5000 + ".yaml", "/dev/zero/x.yaml"):
        with pytest.raises(ValueError, match=r"no such preset|does not exist|cannot be read"):
            SparseConfig.load(name)


WORDS = {
    "0.2": 0.2, "1e-3": 1e-3, "3.": 3.0, "3": 3, "1_024": 1024, ".inf": math.inf,
    "yes": True, "off": False, "True": True, "null": None, "~": None, "": None, "[1, x]": [1, "x"],
    "1.2.3": "1.2.3", "e3": "e3", "2024-01-01": "2024-01-01", "'0x10'": "0x10", "'1:30'": "1:30",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_of_yaml(word):
    assert read(word, "text") == WORDS[word] and type(read(word, "text")) is type(WORDS[word])


@pytest.mark.parametrize(
    "word", ["0x10", "-07", "010", "0b11", "1:30", "1:30:00.5", "[1, 0o7, 010]"]
)
def test_numbers_that_yaml_reads_in_another_base_are_refused(word):
    with pytest.raises(ValueError, match=r"text, line 1: '.*' is no plain number"):
        read(word, "text")


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
@example("1e-3").via("a number of YAML 1.2 and text of YAML 1.1")
@example("yes")
@example(" a: b # c ")
@example("&x")
@example(":\x85\u2028\t")
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back_from_yaml(text):
    if "${" in text:
        return
    config = SparseConfig.from_dict({"about": text})
    assert config.about == text
    assert SparseConfig.from_dict(read(config.to_yaml(), "text")) == config


NUMBERS = [np.float64(0.2), np.float32(0.25), np.array(0.2), torch.tensor(0.25), "0.2", "2e-1"]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}-{n}")
def test_numbers_of_other_libraries_are_numbers(number):
    config = SparseConfig.from_dict({"schedule": {"density": number}})
    assert type(config.schedule.density) is float and config.schedule.density == float(number)
    assert SparseConfig.from_dict(config.to_dict()) == config and hash(config)


def test_arrays_and_truths_of_other_libraries():
    for tile in (np.array([2, 4, 4]), torch.tensor([2, 4, 4]), torch.Size([2, 4, 4]), range(2, 5)):
        config = SparseConfig.from_dict({"layout": {"tile": tile}})
        assert config.layout.tile == tuple(int(n) for n in tile)
        assert {type(n) for n in config.layout.tile} == {int}
    config = SparseConfig.from_dict(
        {"force": {"text": np.False_}, "kernel": {"block_k": np.int64(32), "qk": np.str_("native")}}
    )
    assert config.force.text is False and type(config.kernel.block_k) is int
    assert type(config.kernel.qk) is str
    with pytest.raises(ValueError, match=r"layout.tile=array.*allowed is a list of integers"):
        SparseConfig.from_dict({"layout": {"tile": np.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"schedule.dense_layers has 10,000 entries"):
        SparseConfig.from_dict({"schedule": {"dense_layers": np.arange(10_000)}})
    with pytest.raises(ValueError, match=r"schedule.density=tensor.*meta.*allowed is a number"):
        SparseConfig.from_dict({"schedule": {"density": torch.ones(1, device="meta")}})
    with pytest.raises(ValueError, match=r"selector.shares\[0\]=nan: allowed is a number"):
        idle = {"name": "pyramid", "mode": "mass", "shares": [math.nan, 1]}
        SparseConfig.from_dict({"selector": idle})


def test_text_in_quotes_is_what_a_field_wants():
    sections = {"schedule": {"dense_steps": "0.3"}, "kernel": {"block_q": "128", "impl": "cpu"}}
    sections |= {"force": {"text": "no"}, "layout": {"tile": "[2, 4, '4']"}}
    found = SparseConfig.from_dict(sections)
    assert (found.schedule.dense_steps, found.kernel.block_q, found.force.text) == (0.3, 128, False)
    assert found.layout.tile == (2, 4, 4)
    for section, key, value in (("force", "text", "3"), ("schedule", "dense_steps", "[0")):
        with pytest.raises(ValueError, match=rf"{section}.{key}=.*: allowed is"):
            SparseConfig.from_dict({section: {key: value}})


TEXTS = ["", "auto", "${x}", "1e400", "nan", "[", "???", "0.5", "warmup", "\0"]
NUMERIC = [0, -1, 2**63, 0.25, math.nan, math.inf, -0.0, 1e-320]
ODD = [None, True, b"x", 1j, {1}, object(), print, np.ones(3), torch.ones(2, 2)]
KEYS = ["layout", "schedule", "kernel", "force", "selector", "about", "name", "density", "tile"]
KEYS += ["levels", "shares", "dense_layers", "block_k", "sparsity", "min_tokens", "compensation"]
SCALARS = st.one_of(
    *(st.sampled_from(options) for options in (TEXTS, NUMERIC, ODD)),
    st.text(max_size=5),
    st.builds(lambda: 10**5000),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=3), st.integers(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
FOREIGN = re.compile(r"OmegaConf|omegaconf|object has no attribute|KeyError|recursion|set_int_max")


@given(VALUES, st.lists(st.one_of(st.text(max_size=12), VALUES), max_size=2))
@settings(max_examples=40, deadline=None)
def test_any_values_are_taken_or_refused_in_our_words(values, overrides):
    for make in (
        lambda: SparseConfig.from_dict(values),
        lambda: SparseConfig.load("tiles", overrides),
        lambda: SparseConfig.from_dict({"schedule": values, "layout": {"tile": values}}),
        lambda: SparseConfig.load("tiles", [f"schedule.density={short(v)}" for v in overrides]),
    ):
        try:
            config = make()
        except (ValueError, TypeError) as error:
            assert type(error) in (ValueError, TypeError)
            assert not FOREIGN.search(str(error)) and len(str(error)) < 1000
        else:
            assert SparseConfig.from_dict(config.to_dict()) == config and hash(config)


def test_a_dict_that_holds_itself_is_refused():
    loop: dict = {}
    loop["schedule"] = loop
    with pytest.raises(ValueError, match="nested deeper than 8 levels"):
        SparseConfig.from_dict(loop)
    items: list = [1]
    items.append(items)
    with pytest.raises(ValueError, match="nested deeper than 8 levels"):
        SparseConfig.from_dict({"layout": {"tile": items}})
