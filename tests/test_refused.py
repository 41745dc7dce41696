"""Who asks for a method that cannot be offered is told why, in one line."""

import pytest

from vidsparse import registry
from vidsparse.config import SparseConfig, presets, resolve
from vidsparse.refused import ELSEWHERE, REFUSED, refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_refused_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"^preset '{name}': ") as caught:
        SparseConfig.load(name)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 200 and "no such preset" not in said


def test_names_are_read_as_people_write_them() -> None:
    assert refused("SeerAttention") == refused("seer-attention") == REFUSED["seerattention"]
    with pytest.raises(ValueError, match="needs trained weights"):
        resolve("SLA")
    assert refused("balanced") is None
    with pytest.raises(ValueError, match="no such preset; there are"):
        SparseConfig.load("slab")


def test_nothing_is_refused_that_exists_and_cures_do() -> None:
    assert not {*REFUSED} & {*presets()}
    stages = {stage: registry.methods(stage) for stage in registry.STAGES}
    cures = 0
    for why in REFUSED.values():
        for word in why.replace(",", " ").split():
            key, _, value = word.strip(".;:").partition("=")
            if value:
                stage, _, setting = key.partition(".")
                if key == "preset":
                    assert value in presets(), why
                elif setting == "name":
                    assert value in stages[stage], why
                else:
                    plain = "compensation.name=none", f"{key}={value}"
                    assert SparseConfig.load("topp", plain) != SparseConfig.load("topp", plain[:1])
                cures += 1
    assert cures >= 14


VISION = "Routing Transformer", "BiFormer", "DSVT", "Sparsifiner", "FlashMask"
SYSTEMS = "NOSA", "Kinetics", "PowerAttention", "MTraining", "S2", "MoA", "HeSS", "DELTA"


@pytest.mark.parametrize("name", [*VISION, *SYSTEMS, "FlashBlock", "Light-Forcing"])
def test_backbones_and_systems_of_the_field_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"^preset '{name}': (?!no such)"):
        SparseConfig.load(name)


def test_published_names_lead_to_their_presets() -> None:
    for name, preset in ELSEWHERE.items():
        assert preset in presets() and name not in {*presets(), *REFUSED}
    for name, preset in (
        ("SVG-EAR", "svg_ear"),
        ("SALE", "lowbit"),
        ("Radial Attention", "radial"),
    ):
        with pytest.raises(ValueError, match=f"^preset '{name}': here it is preset={preset}$"):
            SparseConfig.load(name)
