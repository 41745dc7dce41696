"""Estimator: cheap scores of how much attention every query block pays to every key block.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys.
    def estimate(q, k, q_blocks, k_blocks, params, order=None, key_means=None) -> Scores
        scores [B, H, nq, nk] that say what they are: kind "logit" (compare inside a row) or
        "mass" (rows sum to 1).

q [B, H, Sq, D] and k [B, H, Sk, D], after norm and RoPE, any float dtype (strided views allowed);
position t of the blocks is token order[t] of both, int64 [S], or token t without an order.
key_means: float32 [B, H, nk, D], the means of k if somebody has made them already. Means
and sums run over the real tokens of a block only and in fp32.
"""
