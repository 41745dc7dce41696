"""Pytest plugin: every pipeline that diffusers' own tests build is accelerated before it is used.

Loaded by `run.py` into a run of the tests of a diffusers checkout; VIDSPARSE_PEER says how:

    stock    nothing is changed; what fails here is not ours
    dense    accelerated when built, every self-attention call at density 1
    sparse   accelerated when built, density 0.5 in blocks of 16, videos of 64 px, not 16 or 32
    late     as dense, but accelerated by the pipeline's first call, after all that a test sets

The diffusers under test is the installed one. A transformer that a test builds alone gets a
pipeline around it by its first call, in every mode, and `vidsparse.step(1, 2)`. Small stand-ins
take the place of the tokenizers, text and image encoders that tests would load from a hub.
"""

import functools
import inspect
import os
import re
from collections import Counter, defaultdict
from typing import Any

import diffusers  # before the checkout's conftest can put its own sources first
import pytest
import stand_ins
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from layouts import straighten
from PIL import Image
from torch.nn.functional import interpolate

import vidsparse
from vidsparse.pipelines.families import adapters

MODE = os.environ.get("VIDSPARSE_PEER", "stock")
PIXELS = 64
COMMON = ["schedule.name=constant", "schedule.min_tokens=0"]
OVERRIDES = {
    "dense": [*COMMON, "schedule.density=1.0"],
    "late": [*COMMON, "schedule.density=1.0"],
    "sparse": [
        *COMMON,
        "schedule.density=0.5",
        "kernel.block_q=16",
        "kernel.block_k=16",
        "kernel.impl=cpu",  # "auto" goes dense where that is faster
    ],
}
calls: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""File of tests -> its self-attention calls, "sparse" and "dense", by all reports."""


def pytest_configure(config: pytest.Config) -> None:
    stand_ins.install()
    if MODE == "stock":
        return
    for pipeline in {pipeline for adapter in adapters() for pipeline in pipelines(adapter)}:
        change_pipeline(pipeline)
    for adapter in adapters():
        change_model(adapter)
        if MODE == "sparse":
            grow_positions(adapter.transformer)


def pipelines(adapter: Any) -> list[type[DiffusionPipeline]]:
    """Those that the adapter names, and all others that take its transformer."""
    exported = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    kind = rf"\b{adapter.transformer.__name__}\b"
    return [
        one
        for one in exported
        if one.__name__ in adapter.pipelines
        or re.search(kind, str(inspect.signature(one.__init__).parameters.get("transformer", "")))
    ]


def accelerate(pipe: Any) -> None:
    """Accelerate a pipeline that holds an eager transformer of its own."""
    for adapter in adapters():
        if adapter.transformers(pipe):
            vidsparse.accelerate_pipeline(pipe, "balanced", OVERRIDES[MODE])
            return


def change_pipeline(pipeline: type[DiffusionPipeline]) -> None:
    """Accelerate at the end of __init__, or at the first call."""
    init, call = pipeline.__init__, pipeline.__call__

    @functools.wraps(init)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if MODE != "late" and type(self).__init__ is built:
            accelerate(self)

    @functools.wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if MODE == "late" and "_vidsparse_late" not in self.__dict__:
            self.__dict__["_vidsparse_late"] = True
            accelerate(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            note(self)

    pipeline.__init__, pipeline.__call__ = built, called


def change_model(adapter: Any) -> None:
    """Put a transformer that a test of models builds into a pipeline, which it keeps alive."""
    model: type[ModelMixin] = adapter.transformer
    forward = model.__call__

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not bare:
            return forward(self, *args, **kwargs)
        if self not in around:
            around[self] = Around(self)
            accelerate(around[self])
        with vidsparse.step(1, 2):
            try:
                return forward(self, *args, **kwargs)
            finally:
                note(around[self])

    model.__call__ = called


def grow_positions(model: type[ModelMixin]) -> None:
    """Learned positions are of one size: let a pipeline's transformer have those of `PIXELS`."""
    init = model.__init__
    if "use_learned_positional_embeddings" not in inspect.signature(init).parameters:
        return

    @functools.wraps(init)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_learned_positional_embeddings") and not bare:
            kwargs |= dict.fromkeys(("sample_height", "sample_width"), PIXELS // 8)
        init(self, *args, **kwargs)

    model.__init__ = built


class Around(DiffusionPipeline):
    """The least that is a pipeline."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.register_modules(transformer=transformer, scheduler=scheduler)


around: Any = torch.utils.weak.WeakIdKeyDictionary()
"""Bare transformer -> the pipeline around it."""
bare = False
file = ""
"""Of the running test."""
noted: Any = torch.utils.weak.WeakIdKeyDictionary()
"""Report -> number of its calls that are counted."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests get positions of videos, and in the sparse mode larger ones: 16 px are three tokens."""
    classes = {case: is_of_models(item) for item in items if (case := getattr(item, "cls", None))}
    for case, models in classes.items():
        if models:
            straighten(case)
        elif MODE == "sparse" and hasattr(case, "get_dummy_inputs"):
            case.get_dummy_inputs = larger(case.get_dummy_inputs)
            shape = inspect.getattr_static(case, "output_shape", None)
            if isinstance(shape, tuple):
                case.output_shape = enlarged(shape)
            elif isinstance(shape, property):
                case.output_shape = property(lambda self, of=shape: enlarged(of.fget(self)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Tests of models, and their fixtures, run bare transformers."""
    global bare, file
    bare, file = is_of_models(item), item.nodeid.partition("::")[0]
    return (yield)


def is_of_models(item: pytest.Item) -> bool:
    """Whether a test is of models: sizes of their inputs are those of tensors, not of a video."""
    return "tests/models/" in item.path.as_posix()


def enlarged(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., channels, height, width], or with the three colours last, of a larger video."""
    end = len(shape) - (shape[-1] == 3)
    return (*shape[: end - 2], PIXELS, PIXELS, *shape[end:])


def larger(inputs: Any) -> Any:
    """The same inputs with a larger video, and with images, masks and videos of its size."""

    @functools.wraps(inputs)
    def changed(*args: Any, **kwargs: Any) -> Any:
        found = inputs(*args, **kwargs)
        for one in found if isinstance(found, tuple) else (found,):
            if isinstance(one, dict) and {"height", "width"} <= set(one):
                size = one["height"], one["width"]
                one.update((name, grown(value, size)) for name, value in one.items())
                one["height"] = one["width"] = PIXELS
        return found

    return changed


def grown(value: Any, size: tuple[int, int]) -> Any:
    """An image, one as a tensor, or a list of them; if it was as large as the video."""
    if isinstance(value, list):
        return [grown(one, size) for one in value]
    if isinstance(value, Image.Image) and value.size == size[::-1]:
        return value.resize((PIXELS, PIXELS))
    if isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[-2:] == size:
        flat = value.reshape(-1, 1, *size).float()
        return (
            interpolate(flat, (PIXELS, PIXELS)).reshape(*value.shape[:-2], PIXELS, PIXELS).to(value)
        )
    return value


def note(pipe: Any) -> None:
    """Count what the run of a pipeline did."""
    try:
        report = vidsparse.run_report(pipe)
    except ValueError:  # not accelerated: restored, or of no supported family
        return
    new = report.calls[noted.get(report, 0) :]  # that of bare forwards grows from one to the next
    noted[report] = len(report.calls)
    sparse = sum(call.reason is None for call in new)
    calls[file].update(sparse=sparse, dense=len(new) - sparse)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, found in calls.items():
        terminalreporter.write_line(
            f"vidsparse calls in {name}: {found['sparse']} sparse, {found['dense']} dense"
        )
