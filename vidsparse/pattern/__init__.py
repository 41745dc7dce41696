"""Pattern: blocks that are exact because of where they stand, whatever q and k are.

A method is a file here with

    class Params
        frozen dataclass, first field `name`; its other fields are the YAML keys. `of_video`:
        whether it asks where tokens stand in the video, which an order of each head would change;
        perhaps `of_raster`, whether it takes them to stand in raster order, and `per_head`.
    def settings(places: Places, density: float, params: Params) -> Sequence[Params]
        what `params` may stand for on this grid, by falling work, at least one; `params` itself, or
        others where the size is left to the budget: the largest whose blocks cost no more is taken.
    def blocks(places: Places, phase: int, params: Params) -> Tensor
        bool [nq, nk], or [H, nq, nk] for heads with patterns of their own, on the CPU. Text is none
        of its business: it is forced, or not, by `force`.
    def phase(context: StepContext | None, params: Params) -> int
        which of its maps a step and layer has: all that `blocks` may know of them.

A method whose `Params` has a `file`, a plan for all layers and heads (`vidsparse.head_plans`), has

    CANDIDATES: tuple[str, ...], ALLOWED: str
        names of patterns to choose among, and which names there are, in words.
    def named(name: str, params: Params) -> Params, def name_of(params: Params) -> str
        settings with that pattern for all heads, and back. Raises ValueError.

Patterns are forced blocks: selector `static` keeps nothing else, all others choose beside them.
They are pure functions, computed once for a grid and kept (`vidsparse.geometry.patterned`).
"""
