"""Estimator: cheap scores of how much every query block needs every key block.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys. `kind`: of its
        scores. What it costs: `spread`, whether it reads that of the draft; `reads_tokens`, whether
        every key and value. One that makes more products than those of block means has
        `products(block_q, block_k, heads) -> (float, float)`: how many pairs are scored, as a share
        of those of all queries and keys, and numbers in each of these products, by head dim;
        `one_launch` there, if on a GPU none of them reaches memory. `of_clusters`, if it asks for
        those of a layout.
    def estimate(draft: Draft, params: Params) -> Scores
        scores [B, H, nq, nk] that say what they are: kind "logit" (logarithms of mean weights),
        "mass" (rows sum to 1) or "rank" (they compare inside a row, and are no mass; `logits` of
        block means stand beside them).

draft: `vidsparse.draft.Draft`, q, k and v of the call in blocks.
"""
