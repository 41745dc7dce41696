"""The public act: accelerate a diffusers pipeline, look at what a run did, undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from vidsparse.config import SparseConfig, resolve
from vidsparse.pipelines.provenance import calibrated_for, of_another_model
from vidsparse.pipelines.recognition import adapter_for, require_pipeline
from vidsparse.pipelines.report import RunReport
from vidsparse.plain_values import override_list

if TYPE_CHECKING:  # importing diffusers takes seconds: only when there is a pipeline to accelerate
    from vidsparse.pipelines.adapter import Adapter
    from vidsparse.pipelines.installation import Installation
    from vidsparse.pipelines.observation import Observer

Pipe = TypeVar("Pipe")

_installed: WeakKeyDictionary[Any, Installation] = WeakKeyDictionary()


def accelerate_pipeline(
    pipe: Pipe,
    preset: str | Path | Mapping[str, Any] | SparseConfig = "balanced",
    overrides: str | Iterable[str] | None = (),
    *,
    adapter: Adapter | str | None = None,
    target: str | None = None,
) -> Pipe:
    """Make the self-attention of a video pipeline block-sparse, in place; the pipeline is returned.

    pipe: a diffusers pipeline of a supported family. Offload and compile afterwards.
    preset: name of a preset (`vidsparse.presets()`), path of a YAML file, nested dict or
        `SparseConfig`; "auto": the one that `vidsparse calibrate` made for this model, from
        presets/ or shipped. What the device cannot execute is refused at the first forward, which
        may be on another device than now.
    overrides: `section.key=value` strings, as in ["schedule.density=0.2"], or one such string.
    target: which "auto" takes if there are several, as "psnr30".
    adapter: None takes the family's own. For models that no family file describes: an `Adapter` of
        yours, or "generic", which finds out what it can and warns of what it cannot
        (`vidsparse.generic_adapter` takes what you know).

    A second call replaces the first. It is the transformers that are accelerated: other pipelines
    that hold them (`copy.copy(pipe)`, `X.from_pipe(pipe)`, `X(**pipe.components)`), made before or
    after, run sparse too, each with steps and a report of its own, in several threads as well. The
    pipeline is held weakly. To copy a transformer, restore the pipeline first.

    Several processes can share a video: `pipe.transformer.enable_parallelism(config=
    diffusers.ContextParallelConfig(ulysses_degree=n))` in each, before this or after, for
    HunyuanVideo and CogVideoX after. Each then computes a share of the heads; what cannot be shared
    is refused here or at the first forward (`vidsparse.pipelines.parallel`).

    Raises TypeError if `pipe` is no diffusers pipeline; ValueError if its class is not supported,
    if a setting does not exist or does not fit the model, if its transformer is missing, without
    weights or wrapped, or its attention customised or compiled, or split between processes in
    another way, or if another pipeline has accelerated a transformer of it with other settings.
    """
    require_pipeline(pipe)
    changes = override_list(overrides)
    if preset == "auto":
        preset = calibrated_for(pipe, target)
    elif target is not None:
        raise ValueError(f'target={target!r} with preset {preset!r:.80}: it chooses among "auto"')
    config = resolve(preset, changes)
    if other := of_another_model(config.calibrated, pipe):
        warnings.warn(f"vidsparse {preset!s:.80}: {other}", RuntimeWarning, stacklevel=2)
    chosen = adapter_for(pipe) if adapter is None else _chosen(adapter, pipe)
    from vidsparse.pipelines.installation import Installation, check_layers, label

    for name, transformer in chosen.transformers(pipe).items():
        check_layers(config, name, len(chosen.self_attention(transformer)))
    for installation in _installations(pipe):
        owner = installation.owner()
        if owner is None or owner is pipe:
            continue
        if installation.config != config:
            raise ValueError(
                f"a transformer of this {type(pipe).__name__} is already accelerated through "
                f"another pipeline that shares it ({type(owner).__name__}), with the settings "
                f"{installation.preset!r}: restore_pipeline that one first, or give both the same"
            )
        if installation.covers(chosen.transformers(pipe).values()):
            return pipe
    restore_pipeline(pipe)
    _installed[pipe] = Installation(pipe, chosen, config, label(preset, changes))
    return pipe


def _chosen(adapter: object, pipe: Any) -> Adapter:
    """The adapter that a user means."""
    from vidsparse.pipelines.adapter import Adapter
    from vidsparse.pipelines.generic import generic_adapter

    if adapter == "generic":
        return generic_adapter(pipe)
    if not isinstance(adapter, Adapter):
        raise TypeError(f'adapter={adapter!r:.80}: expected an Adapter, "generic", or None')
    if not adapter.transformers(pipe):
        raise ValueError(
            f"this {type(pipe).__name__} holds no {adapter.transformer.__name__} as "
            f"{' or '.join(adapter.components)}, of which the adapter is"
        )
    return adapter


def restore_pipeline(pipe: Pipe) -> Pipe:
    """Undo `accelerate_pipeline`: processors, hooks, scheduler and every pixel are as before.

    What others changed in the meantime stays: fused or adapted weights, an attention backend, hooks
    and wrappers around `forward` or `scheduler.step`, in whatever order they came. A processor that
    someone put in the place of ours stays too, with a RuntimeWarning. A transformer that several
    processes share stays so, but for HunyuanVideo and CogVideoX, whose stock attention cannot: then
    each process computes the whole video. A pipeline that is not
    accelerated is returned as it is. A transformer that several pipelines share becomes stock for
    all of them. Raises TypeError if `pipe` is no pipeline.
    """
    require_pipeline(pipe)
    for installation in _installations(pipe):
        replaced = installation.remove()
        if replaced:
            warnings.warn(
                f"{replaced} attention processors were no longer vidsparse's and stay as they are",
                RuntimeWarning,
                stacklevel=2,
            )
    _installed.pop(pipe, None)
    return pipe


@contextmanager
def observing(pipe: Any, observer: Observer) -> Iterator[None]:
    """Show an observer every self-attention call of an accelerated pipeline inside the block.

    observer: takes an `ObservedCall`, after the call; what it raises ends the run. Calls of other
    pipelines that share the transformers are shown too. Raises ValueError if the pipeline is not
    accelerated, TypeError if it is no diffusers pipeline.
    """
    installation = _accelerated(pipe)
    installation.observers.append(observer)
    try:
        yield
    finally:
        installation.observers.remove(observer)


def run_report(pipe: Any) -> RunReport:
    """What the last run of an accelerated pipeline did, or the running one so far.

    Each pipeline that runs a shared transformer has its own report, empty before its first run. It
    costs nothing: a `callback_on_step_end` may ask for `.last`, the latest call, and `.steps`.
    Raises ValueError if the pipeline is not accelerated, or has got another transformer since;
    TypeError if it is no diffusers pipeline.
    """
    return _accelerated(pipe).report(pipe)


def _accelerated(pipe: Any) -> Installation:
    """What accelerates a pipeline. Raises as `run_report`."""
    require_pipeline(pipe)
    installations = _installations(pipe)
    if not installations:
        raise ValueError(
            f"this {type(pipe).__name__} is not accelerated: call accelerate_pipeline first"
        )
    replaced = installations[0].replaced(pipe)
    if replaced:
        raise ValueError(
            f"{' and '.join(replaced)} of this {type(pipe).__name__} was replaced since "
            "accelerate_pipeline, so its attention is dense: call accelerate_pipeline again"
        )
    return installations[0]


def _installations(pipe: Any) -> list[Installation]:
    """Through this pipeline, and through others on transformers that it holds."""
    from vidsparse.pipelines.installation import installation_of

    found = [_installed.get(pipe)]
    found += [installation_of(module) for module in vars(pipe).values()]
    return [i for n, i in enumerate(found) if i is not None and i.parts and i not in found[:n]]
