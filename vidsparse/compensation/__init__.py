"""Compensation: what the blocks that the selector left out still give.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys. `first_order`:
        the term that it asks of the executor, of `BlockPlan`; `centroids`: whether `rest` is the
        centroid level; `spread`: whether it reads that of the draft. `blend`, of one that gives
        the plan a blend.
    def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan
        the same lists with the treatment of everything unlisted (`rest`, `first_order`,
        `rest_bias`); draft: what the plan was drafted from.

The kernel executes the completed plan in one softmax, which equals merging both parts by their LSE.
"""
