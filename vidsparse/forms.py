"""Forms of the Triton engine for exact tiles, and their names in results. Imports nothing."""

FORMS = ("pointer", "tma")

AUTO = {9: ("tma", "pointer")}
"""Major compute capability -> forms that `kernel.form: auto` asks in this order, by the figures in
kernels/results/gpu_bench.csv; on others, where nothing is measured, it is the pointer form.

There was a third, warp-specialised by Triton 3.6, that took 5 to 17 % less time: it gave NaN on an
H100 and an H200, with three and four stages at every large size, with two now and then.
"""


def auto(major: int) -> tuple[str, ...]:
    """What `kernel.form: auto` asks, the first that takes a call runs it; the last takes all."""
    return AUTO.get(major, ("pointer",))


def way(form: str) -> str:
    """A form beside other engines, which go by their own names."""
    return f"triton-{form}"
