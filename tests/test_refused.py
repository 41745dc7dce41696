"""Who asks for a method that cannot be offered is told why, in one line."""

import pytest

from vidsparse import registry
from vidsparse.config import SparseConfig, presets, resolve
from vidsparse.refused import REFUSED, refused


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
                known = presets() if key == "preset" else stages[key.removesuffix(".name")]
                assert value in known, why
                cures += 1
    assert cures >= 4
