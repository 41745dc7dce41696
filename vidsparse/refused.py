"""Methods of the field that are no presets here, each with the reason or the name it has here."""

TRAINED = "needs trained weights, which no checkpoint of the pipelines has"
DECODING = "trades a key cache against decoding, and denoising has neither"
CAUSAL = "needs a causal mask, and video attends both ways"

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
    "routingtransformer": f"{TRAINED}: centroids learnt with the model, queries and keys shared; "
    "k-means without training is preset=svg2",
    "reformer": f"{TRAINED}: hashes of queries that are the keys, too; near tokens in one block, "
    "without, are layout.name=content",
    "biformer": f"{TRAINED}: a backbone made with its regions; their means, untrained, are "
    "estimator.name=mean",
    "sparsifiner": f"{TRAINED}: a learnt predictor of which tokens see each other",
    "dynamicvit": f"{TRAINED}: a learnt predictor of which tokens to drop",
    "swin": f"{TRAINED}: a backbone made with its windows; windows on a model that had none are "
    "preset=sta",
    "longformer": f"{TRAINED}: a model made with its window; bands on a model that had none are "
    "pattern.name=band",
    "bigbird": f"{TRAINED}: a model made with its window, random and global tokens",
    "performer": f"{TRAINED}: linear attention by random features; what is left out here still "
    "gives compensation.name=taylor",
    "linformer": f"{TRAINED}: learnt projections of the sequence; pooled keys, untrained, are "
    "preset=pyramid",
    "quadtree": f"{TRAINED}: a backbone made with its levels; levels, untrained, are "
    "preset=pyramid",
    "dsvt": "is a backbone for point clouds, whose voxels it sorts into sets in turns; tokens of a "
    "video sorted in turns are layout.name=cycle",
    "lightforcing": "is for autoregressive video, chunk after chunk, which no pipeline here makes",
    "nosa": "evicts keys from a cache, and denoising has none",
    "kinetics": DECODING,
    "quest": DECODING,
    "h2o": DECODING,
    "snapkv": DECODING,
    "streamingllm": DECODING,
    "powerattention": CAUSAL,
    "flexprefill": f"{CAUSAL}; the mass that a row has to reach is preset=topp",
    "blockrank": "ranks documents in the context of a language model",
    "mtraining": "is distributed training",
    "s2": "is distributed training",
    "minference": "reads sinks and a causal window; its vertical and slash lines are patterns "
    "of preset=vdit",
    "flashmask": "is a format of masks for a kernel, and chooses nothing; what is chosen here runs "
    "on tiles of any map",
    "flexattention": "is a kernel for masks that are given, and chooses nothing",
    "flashmoba": f"is a kernel for MoBA, which {TRAINED}; what works without is preset=vmoba",
    "sageattention": "is dense attention in 8 bits; queries and keys in 8 bits on sparse tiles are "
    "kernel.qk=int8",
    "moa": "is a budget for each head and layer: `vidsparse calibrate` makes one for your model",
    "hess": "is a budget for each head by its sensitivity: `vidsparse calibrate` makes one for "
    "your model",
    "delta": "takes the choice of one layer for others, whose heads are not the same heads in a "
    "video model; that of one step for others is keep.plans=4",
    "flashblock": "keeps what is left out from step to step: with any preset without "
    "compensation, keep.tail=3",
}
"""Name, as `refused` reads it -> why, in one line with the cure if there is one."""

ELSEWHERE = {
    "anchorattention": "absdiff",
    "attencarve": "jenga",
    "draftattention": "draft",
    "hip": "hier",
    "hisa": "hier",
    "keysort": "pbs",
    "natten": "gna",
    "neighborhoodattention": "gna",
    "pbsattn": "pbs",
    "proxyattn": "proxy",
    "radialattention": "radial",
    "rectifiedspaattn": "rectified",
    "sale": "lowbit",
    "skipsoftmax": "blasst",
    "slidingtileattention": "sta",
    "solattn": "sol",
    "spargeattn": "sparge",
    "sparsevdit": "vdit",
    "sparsevideogen": "svg1",
    "sparsevideogen2": "svg2",
    "svg": "svg1",
    "svgear": "svg_ear",
    "xattention": "xattn",
}
"""Published name, as `refused` reads it -> its preset."""


def refused(name: str) -> str | None:
    """Why there is no such preset, or which one it is; None if nothing is known of it.

    Case, "-", "_" and blanks do not count.
    """
    known = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    if known in ELSEWHERE:
        return f"here it is preset={ELSEWHERE[known]}"
    return REFUSED.get(known)
