"""Layout: the order in which the tokens of a video stand in the sequence.

A good order makes every run of block_k consecutive tokens a compact 3-D region, because then one
draft score and one pooled key stand for the whole block.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys.
    def video_order(grid: TokenGrid, params: Params) -> Tensor
        int64 [grid.video_tokens]: raster index (frame, row, column) of the token at each new
        position; a permutation of 0 .. video_tokens - 1 for any grid, divisible by nothing.

Text tokens keep their place. The order depends on the grid alone, so a pipeline permutes its tokens
once per forward instead of once per layer.
"""
