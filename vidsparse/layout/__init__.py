"""Layout: the order in which the tokens of a video stand in the sequence.

A good order makes every run of block_k consecutive tokens a compact 3-D region, because then one
draft score and one pooled key stand for the whole block.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys. `per_head`:
        whether heads have orders of their own above it; then also `shared`, whether queries and
        keys stand in the same one, `refresh` and `axes`, as below, and perhaps `by_pattern`,
        whether it compares what a pattern holds, or `clusters`, whether it makes any; and, where
        orders are no bisection, `making`, what they cost, and `steady`, the settings of all steps
        of a run but the first.
    def video_order(grid: TokenGrid, params: Params) -> Tensor
        int64 [grid.video_tokens]: raster index (frame, row, column) of the token at each new
        position; a permutation of 0 .. video_tokens - 1 for any grid, divisible by nothing.

    def pieces(grid: TokenGrid, params: Params) -> Tensor
        only where `params.ragged` may be true, and then: int64 [n], tokens of consecutive pieces of
        the video in that order, which no block crosses.

    def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> tuple[Tensor, Tensor, Tensor]
        only where `per_head`: orders of queries and of keys, int64 [B, H, S], as a Draft takes
        them, and bool [B, H], the heads that have one; with clusters as the fourth of
        `vidsparse.draft.Orders`. draft: of the tokens in video order. They
        are kept for `params.refresh` steps, and compare `params.axes` numbers of a token (0: all).

Text tokens keep their place. The video order depends on the grid alone, so a pipeline permutes its
tokens once per forward instead of once per layer; orders of heads cost a gather where keys and
queries are read.
"""
