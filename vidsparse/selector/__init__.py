"""Selector: from scores and a budget to a level per (head, query block, key block).

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys. `levels`: those
        that it may give, ascending. `spends_budget`: whether the plan's density is the budget
        whatever q and k are. `needs_mass`: whether scores that only rank are of no use.
    def select(scores, forced, density, k_blocks, params) -> Tensor
        int8 [B, H, nq, nk]: 0 exact, l = pooled by 2^l, SKIP = not listed (left to the
        compensation).

scores: `vidsparse.plan.Scores`; a score may be NaN or infinite when the input is, the row must get
a valid plan all the same. forced: bool, broadcastable to the scores; these blocks are exact.
density: in (0, 1), share of the keys' work that a row may cost. k_blocks: the cut of the keys. Ties
go to the lower block index; the result is a pure function of its arguments.
"""
