"""Why calls run dense, in a file that reports can read without torch."""

REASONS = {
    "warmup-step": "a dense step of the schedule",
    "dense-layer": "a dense layer of the schedule",
    "cross-attention": "not self-attention of the video",
    "too-short": "fewer tokens than schedule.min_tokens",
    "unsupported-head-dim": "no kernel for this head dimension",
    "no-kernel": "no sparse kernel for this device",
    "not-faster": "sparse is not faster than dense at this density and length on this device",
    "user": "density 1 asked for",
    "masked": "an attention mask that a block plan cannot express",
    "layer-skip": "guidance that skips the attention scores of this layer",
    "empty": "a batch, heads or head dimension of size 0",
}
"""Why a call was dense: code -> meaning."""
