"""Methods of the field that are no presets here, each with the reason."""

TRAINED = "needs trained weights, which no checkpoint of the pipelines has"

REFUSED = {
    "sla": f"{TRAINED}: without, its linear branch is zero and the rest is top-k; "
    "use compensation.name=centroid",
    "blade": f"{TRAINED}: its mask is distilled together with the steps",
    "seerattention": f"{TRAINED}: a gate on pooled queries and keys; untrained it is "
    "estimator.name=mean",
    "nsa": f"{TRAINED}: three branches with gates of their own",
    "vsa": f"{TRAINED}: two branches with gates of their own",
    "ssa": f"{TRAINED}: sparse and full attention are aligned in training",
    "dma": f"{TRAINED}: its mask is made of values by a trained projection",
    "moba": f"{TRAINED}: routing that the model has learnt; what works without is preset=vmoba",
    "lightforcing": "is for autoregressive video, chunk after chunk, which no pipeline here makes",
    "nosa": "evicts keys from a cache, and denoising has none",
    "kinetics": "trades a key cache against decoding, and denoising has neither",
    "powerattention": "needs a causal mask, and video attends both ways",
    "mtraining": "is distributed training",
    "minference": "reads sinks and a causal window; its vertical and slash lines are patterns "
    "of preset=vdit",
}
"""Name, as `refused` reads it -> why, in one line with the cure if there is one."""


def refused(name: str) -> str | None:
    """Why there is no such preset, None if nothing is known of it. Case, "-", "_" do not count."""
    return REFUSED.get(name.lower().replace("-", "").replace("_", "").replace(" ", ""))
