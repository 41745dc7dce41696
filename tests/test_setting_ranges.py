"""Each setting takes the ends of its range and refuses what lies just outside, by name."""

import math

import pytest
import torch

from vidsparse import TokenGrid, registry
from vidsparse.config import SparseConfig
from vidsparse.kernels.executor import Form

CPU = torch.device("cpu")
BLOCKS = [16, 32, 64, 128, 256, 512]
NO_BLOCKS = [0, 1, 8, 15, 17, 48, 511, 513, 1024, -16]
POSITIVE = ([1, 2, 10**6], [0, -1])
SHARE = ([1e-9, 0.5, 1.0], [0.0, -1e-9, math.nextafter(1, 2), math.inf, math.nan])
STEPS = ([0, 1, 7, 0.0, 0.5, math.nextafter(1, 0)], [-1, -0.5, 1.0, 1.5, math.nan, math.inf])

RANGES = {
    ("schedule", "constant", "density"): SHARE,
    ("schedule", "constant", "min_tokens"): ([0, 1, 10**6], [-1]),
    ("schedule", "warmup", "density"): SHARE,
    ("schedule", "warmup", "min_tokens"): ([0, 1], [-1]),
    ("schedule", "warmup", "dense_steps"): STEPS,
    ("schedule", "warmup", "last_dense_steps"): STEPS,
    ("schedule", "ramp", "dense_steps"): STEPS,
    ("schedule", "ramp", "last_dense_steps"): STEPS,
    ("schedule", "ramp", "start"): SHARE,
    ("schedule", "ramp", "shape"): (["linear", "cosine"], ["", "Linear", "step"]),
    ("schedule", "ramp", "layer_density"): (
        [[], [1.0], [1e-9, 1.0]],
        [[0.0], [0.5, 0.0], [0.5, 1.0001], [-0.1, 0.5]],
    ),
    ("schedule", "table", "dense_steps"): STEPS,
    ("schedule", "table", "last_dense_steps"): STEPS,
    ("schedule", "table", "levels"): (
        [[1e-9], [0.1, 1.0], [n / 10 for n in range(1, 11)]],
        [[], [0.0], [0.5, 0.5], [0.5, 0.1], [0.5, 1.1], [n / 11 for n in range(1, 12)]],
    ),
    ("schedule", "table", "groups"): (
        [["0"], ["00 00", "00 00"]],
        [[], [""], ["1"], ["0 00"], ["00 00", "00"], ["a"], ["-0"]],
    ),
    ("selector", "topk", "min_blocks"): POSITIVE,
    ("selector", "topp", "min_blocks"): POSITIVE,
    ("selector", "topp", "p"): SHARE,
    ("selector", "threshold", "min_blocks"): POSITIVE,
    ("selector", "pyramid", "min_blocks"): POSITIVE,
    ("selector", "pyramid", "mode"): (["quota", "mass"], ["", "rank"]),
    ("selector", "pyramid", "min_share"): ([0.0, 0.06, 0.99], [-0.01, 1.0, math.nan]),
    ("selector", "topp", "min_share"): ([0.0, 0.5, 0.99], [-0.01, 1.0, math.nan]),
    ("selector", "greedy", "p"): SHARE,
    ("selector", "greedy", "reserve"): ([0.0, 0.5], [-0.01, 0.51, math.nan]),
    ("selector", "outlier", "tau"): ([0.0, 2.0, 100.0], [-0.1, 100.1, math.nan]),
    ("selector", "outlier", "min_blocks"): POSITIVE,
    ("selector", "absdiff", "theta"): ([-1000.0, 0.0, 1000.0], [math.inf, -math.inf, math.nan]),
    ("selector", "absdiff", "anchor"): (["near", "row", "zero"], ["", "far"]),
    ("selector", "absdiff", "min_blocks"): POSITIVE,
    ("estimator", "ear", "gamma"): ([0.0, 1.0, 2.0], [-0.1, 2.1, math.nan]),
    ("estimator", "sampled", "share"): ([1, 4, 64], [0, 65, -1]),
    ("estimator", "sampled", "similarity"): (
        [[], [-1.0, 1.0], [0.5] * 9],
        [[1.01], [0.5, -1.01], [0.5] * 10, [math.nan]],
    ),
    ("estimator", "antidiagonal", "stride"): ([1, 2, 4, 8, 16, 32], [0, 3, 64]),
    ("estimator", "alike", "least"): ([-1.0, 0.6, 1.0], [-1.01, 1.01, math.nan]),
    ("estimator", "proxy", "groups"): POSITIVE,
    ("estimator", "proxy", "stride"): ([1, 64], [0, 65]),
    ("estimator", "peak", "pieces"): ([1, 2, 4, 8, 16], [0, 3, 32]),
    ("estimator", "hier", "pieces"): ([1, 2, 4, 8, 16], [0, 3, 32]),
    ("estimator", "hier", "span"): POSITIVE,
    ("estimator", "hier", "keep"): SHARE,
    ("estimator", "relative", "against"): (["near", "running"], ["", "row"]),
    ("estimator", "relative", "bits"): ([0, 4, 8], [1, 2, 16]),
    ("force", None, "neighbours"): ([0, 1, 10**6], [-1]),
    ("force", None, "sinks"): ([0, 1, 10**6], [-1]),
    ("estimator", "mean", "sub_blocks"): ([1, 2, 4, 8], [0, 3, 5, 7, 9, 16, -1]),
    ("layout", "tile", "tile"): ([[1, 1, 1], [9, 1, 7]], [[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
    ("layout", "tile", "inner"): (["raster", "morton"], ["", "random"]),
    ("compensation", "taylor", "scope"): (["global", "block"], ["", "row"]),
    ("kernel", None, "block_q"): ([*BLOCKS, "auto"], [*NO_BLOCKS, "large"]),
    ("kernel", None, "block_k"): (BLOCKS, NO_BLOCKS),
    ("kernel", None, "qk"): (["native", "int8"], ["", "int4"]),
    ("kernel", None, "impl"): (["auto", "reference", "cpu", "triton"], ["", "cuda"]),
    ("kernel", None, "form"): (["auto", "pointer", "tma"], ["", "ws"]),
    ("kernel", None, "cpu_route"): (
        ["auto", "native", "onednn", "mixed", "sdpa"],
        ["", "bf16"],
    ),
}


def built(stage, name, **values):
    method = {"name": name} if name else {}
    large = {"block_k": 512} if stage != "kernel" else {}  # the deepest level is 9
    sections = {"kernel": large, stage: {**method, **values}}
    return getattr(SparseConfig.from_dict(sections), stage)


@pytest.mark.parametrize("setting", RANGES, ids=lambda s: ".".join(filter(None, s)))
def test_the_ends_of_a_range_belong_to_it_and_their_neighbours_do_not(setting):
    stage, name, key = setting
    taken, refused = RANGES[setting]
    for value in taken:
        found = getattr(built(stage, name, **{key: value}), key)
        assert found == (tuple(value) if isinstance(value, list) else value)
        assert isinstance(found, type(value) if not isinstance(value, list) else tuple)
    for value in refused:
        with pytest.raises(ValueError, match=rf"{stage}\.{key}"):
            built(stage, name, **{key: value})


PYRAMIDS = {
    "one level": ({"levels": [0], "shares": [1.0]}, True),
    "the deepest": ({"levels": [0, 9]}, True),
    "too deep": ({"levels": [0, 10]}, False),
    "no level": ({"levels": [], "shares": []}, False),
    "not exact": ({"levels": [1, 3]}, False),
    "below exact": ({"levels": [-1, 3]}, False),
    "twice": ({"levels": [0, 0]}, False),
    "falling": ({"levels": [0, 3, 2], "shares": [0.5, 0.3, 0.2]}, False),
    "uneven": ({"shares": [0.999, 0.001]}, True),
    "zero share": ({"shares": [1.0, 0.0]}, False),
    "more than all": ({"shares": [0.6, 0.41]}, False),
    "less than all": ({"shares": [0.6, 0.39]}, False),
    "as written": ({"levels": [0, 1, 3], "shares": [0.6667, 0.1667, 0.1666]}, True),
    "rounded": ({"levels": [0, 1, 3], "shares": [0.333, 0.333, 0.333]}, False),
    "few shares": ({"levels": [0, 1, 3]}, False),
    "all mass": ({"mode": "mass", "mass": [1.0, 1.0]}, True),
    "some mass": ({"mode": "mass", "mass": [1e-6, 0.5]}, True),
    "equal masses": ({"mode": "mass", "mass": [0.5, 0.5]}, True),
    "no mass": ({"mode": "mass", "mass": [0.0, 0.5]}, False),
    "too much mass": ({"mode": "mass", "mass": [0.5, 1.0001]}, False),
    "falling mass": ({"mode": "mass", "mass": [0.5, 0.4]}, False),
    "few masses": ({"mode": "mass", "mass": [0.5]}, False),
    "shares are idle": ({"mode": "mass", "shares": [0.1, 0.1]}, True),
    "masses are idle": ({"mode": "quota", "mass": [3.0, 0.1]}, True),
}


@pytest.mark.parametrize("case", PYRAMIDS)
def test_pyramids(case):
    values, good = PYRAMIDS[case]
    if good:
        found = built("selector", "pyramid", **values)
        assert all(list(getattr(found, k)) == v for k, v in values.items() if isinstance(v, list))
        assert found.spends_budget == (found.mode == "quota")
    else:
        with pytest.raises(ValueError, match=r"selector\.(levels|shares|mass)"):
            built("selector", "pyramid", **values)


@pytest.mark.parametrize("executor", registry.executors().values(), ids=registry.executors())
def test_the_query_block_follows_the_length_of_the_sequence(executor):
    settings = ({"kernel": {"block_q": size}} for size in ("auto", *BLOCKS))
    configs = [SparseConfig.from_dict(values) for values in settings]
    for tokens in (1, 1000, 16_383, 16_384, 16_385, 10**6):
        grid = TokenGrid(1, 1, tokens)
        sizes = [executor.query_block(Form(config, grid, CPU)) for config in configs]
        assert sizes == [128 if tokens >= 16_384 else 64, *BLOCKS]


DEFAULTS = {
    "layout": {"name": "tile", "tile": (2, 8, 8), "inner": "morton"},
    "estimator": {"name": "mean", "sub_blocks": 1},
    "selector": {"name": "topk", "min_blocks": 1},
    "compensation": {"name": "centroid"},
    "schedule": {
        "name": "warmup",
        "density": 0.25,
        "min_tokens": 1024,
        "dense_steps": 0.2,
        "last_dense_steps": 0,
        "dense_layers": (0,),
    },
    "force": {
        "text": True,
        "own_block": True,
        "first_frame": False,
        "same_frame": False,
        "in_budget": True,
    },
    "kernel": {
        "block_q": "auto",
        "block_k": 64,
        "qk": "native",
        "impl": "auto",
        "form": "auto",
        "cpu_route": "auto",
    },
}
"""A configuration that says nothing; files that users keep mean this by what they leave out."""

METHOD_DEFAULTS = {
    ("selector", "topp"): {"p": 0.9, "min_blocks": 1},
    ("selector", "threshold"): {"min_blocks": 1},
    ("selector", "pyramid"): {
        "mode": "quota",
        "levels": (0, 3),
        "shares": (0.65, 0.35),
        "mass": (0.6, 0.9),
        "min_blocks": 1,
    },
    ("schedule", "ramp"): {"start": 0.5, "shape": "linear", "layer_density": (), "density": 0.25},
    ("schedule", "constant"): {"density": 0.25, "min_tokens": 1024},
    ("compensation", "taylor"): {"scope": "global"},
}


def test_a_file_that_leaves_settings_out_means_what_it_always_did():
    plain = SparseConfig.from_dict({}).to_dict()
    for stage, wanted in DEFAULTS.items():
        assert {key: plain[stage][key] for key in wanted} == wanted
    for (stage, name), wanted in METHOD_DEFAULTS.items():
        found = registry.method(stage, name).Params()
        assert {key: getattr(found, key) for key in wanted} == wanted, name
