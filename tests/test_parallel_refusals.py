"""What several processes cannot share is refused before a forward, in one line with the cure."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
import torch
import zoo
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from parallel_acts import SPARSE, case, shortened

import vidsparse
from vidsparse.pipelines import private
from vidsparse.pipelines.parallel import shares


def split(model: Any, plan: Any = None, **degrees: Any) -> None:
    """As `enable_parallelism` in a process of several; nothing is exchanged before a forward."""
    config = ContextParallelConfig(**degrees)
    config._ulysses_local_rank = 0
    model._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(model, config, plan or model._cp_plan)


def refused(name: str, *, heads: int = 4, grid: Any = None, degree: int = 2, **more: Any) -> str:
    """What a forward of an accelerated case, split between so many, is refused with."""
    chosen = case(name)
    pipe = zoo.Around(shortened(chosen.model(heads, chosen.head_dims[0])), tiny.euler())
    arguments = chosen.arguments(pipe.transformer, grid or chosen.grids[0], 2)
    vidsparse.accelerate_pipeline(pipe, SPARSE)
    split(pipe.transformer, ulysses_degree=degree)
    with pytest.raises(ValueError) as caught, torch.no_grad(), vidsparse.step(1, 2):
        pipe.transformer(**{**arguments, **more})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sizes_that_do_not_divide() -> None:
    said = refused("wan", grid=(3, 5, 7))
    assert said.startswith("105 video tokens of a WanTransformer3DModel do not divide into ulysses")
    assert "degree=2: run it in one process, or change the size" in said
    said = refused("wan", heads=3)
    assert "3 attention heads of a WanTransformer3DModel" in said and "degree=2" in said
    said = refused("wan", heads=4, degree=8)
    assert "4 attention heads" in said and "ulysses_degree=4 does" in said
    words = zoo.noise(2, 14, 16)
    said = refused("hunyuan_video", grid=(3, 5, 4), degree=4, encoder_hidden_states=words)
    assert "14 text tokens of a HunyuanVideoTransformer3DModel" in said and "degree=2 does" in said


def test_a_video_whose_parts_are_told_by_their_place() -> None:
    said = refused("hunyuan_video token_replace")
    assert "treats the first 1 frames of this video apart by their place" in said


@pytest.mark.parametrize(
    "name, grid, what",
    [
        ("flux controlnet", (1, 6, 8), "controlnet_block_samples"),
        ("flux kontext", (1, 5, 7), "img_ids with a batch"),
        ("qwen_image controlnet", (1, 6, 8), "controlnet_block_samples"),
        ("chronoedit token times", (3, 4, 4), "a timestep for each token"),
        ("helios amplified", (3, 4, 4), "the amplified history"),
    ],
)
def test_what_the_plans_of_diffusers_leave_whole(name: str, grid: Any, what: str) -> None:
    """It fails there, or is computed wrong without a word."""
    said = refused(name, grid=grid)
    assert said.startswith(f"{what}, which diffusers does not split for a ")
    assert "ulysses_degree=2; run it in one process" in said


def refuses(pipe: Any, text: str) -> None:
    """To be accelerated, and to run if it has been before."""
    with pytest.raises(ValueError, match=text):
        vidsparse.accelerate_pipeline(pipe, SPARSE)


@pytest.mark.parametrize("first", ["accelerated", "split"])
@pytest.mark.parametrize(
    "degrees, text",
    [
        ({"ring_degree": 2}, "one chunk of the keys at a time"),
        ({"ring_degree": 2, "ulysses_degree": 2}, "one chunk of the keys at a time"),
        ({"ulysses_degree": 2, "ulysses_anything": True}, "ulysses_anything=True"),
    ],
    ids=["ring", "ring and Ulysses", "anything"],
)
def test_schemes_that_are_refused(degrees: Any, text: str, first: str) -> None:
    """Whichever came first."""
    pipe, _ = tiny.build("wan")
    if first == "split":
        split(pipe.transformer, **degrees)
        refuses(pipe, text)
        return
    vidsparse.accelerate_pipeline(pipe, SPARSE)
    split(pipe.transformer, **degrees)
    with pytest.raises(ValueError, match=text), vidsparse.step(1, 2):
        tiny.forward(pipe.transformer)


def test_another_plan_than_ours() -> None:
    pipe, _ = tiny.build("wan")
    plan = {name: pipe.transformer._cp_plan[name] for name in ("rope", "blocks.0", "proj_out")}
    split(pipe.transformer, plan, ulysses_degree=2)
    refuses(pipe, "split by another cp_plan .* call enable_parallelism without cp_plan")


@pytest.mark.parametrize(
    "name, why", [("ltx", "cross-attention fails in stock"), ("mochi", "no cp_plan for it")]
)
def test_models_that_cannot_be_split(name: str, why: str) -> None:
    model = case(name).model(2, case(name).head_dims[0])
    split(model, {"proj_out": private.ContextParallelOutput(1)}, ulysses_degree=2)
    refuses(zoo.Around(model, tiny.euler()), f"a {type(model).__name__} cannot be split .*{why}")


def test_a_plan_of_ours_is_there_while_it_is_accelerated() -> None:
    pipe = zoo.Around(case("cogvideox").model(2, 64), tiny.euler())
    assert isinstance(pipe.transformer, diffusers.CogVideoXTransformer3DModel)
    assert pipe.transformer._cp_plan is None
    vidsparse.accelerate_pipeline(pipe, SPARSE)
    assert pipe.transformer._cp_plan
    vidsparse.restore_pipeline(pipe)
    assert pipe.transformer._cp_plan is None


@pytest.mark.parametrize("first", [True, False], ids=["text first", "text last"])
def test_shares_of_text_are_sorted(first: bool) -> None:
    """Four processes, each with one row of text, 100 .., and three of video, 0 .."""
    text, video = torch.arange(100, 104), torch.arange(12)
    pairs = zip(text.split(1), video.split(3), strict=True)
    together = torch.cat([part for t, v in pairs for part in ((t, v) if first else (v, t))])
    order, back = shares(16, 4, first, 4, torch.device("cpu"))
    assert order is not None and back is not None
    expected = torch.cat([text, video] if first else [video, text])
    assert torch.equal(together[order], expected) and torch.equal(expected[back], together)
    assert shares(16, 0, first, 4, torch.device("cpu")) == (None, None)
