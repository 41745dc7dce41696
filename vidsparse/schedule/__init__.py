"""Schedule: the density of an attention call, from its step and layer.

A method is a file here with

    class Params
        frozen dataclass, first field `name`, on `vidsparse.densities.ConstantParams`, whose
        `dense_in` says which steps of a run are dense in all layers.
    def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]
        density in (0, 1] and None, or (1.0, reason code) for a dense call
        ("warmup-step", "dense-layer", "user").

    def head_densities(context, params) -> tuple[float, ...] | None
        only where heads differ: the density of each head of a call that is sparse, or None if all
        have that of `density_at`, which is their mean.

context None means that the caller knows no step: the steady state, `params.density`. A pure
function; no counters. `min_tokens`: sequences that are shorter are dense ("too-short").
"""
