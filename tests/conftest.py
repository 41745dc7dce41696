"""What every test of Triton kernels in the interpreter runs in; settings of `make mutate`."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, settings

# `make mutate` asks whether a test fails, not on what: the same examples every time, none shrunk.
settings.register_profile(
    "mutate",
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)


@pytest.fixture(autouse=True)
def calm(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the marker `interp`: the patched interpreter, the same numbers in every run, one thread.

    Fresh memory is NaN, or the largest integer.
    """
    if request.node.get_closest_marker("interp") is None:
        yield
        return
    import interpreter

    interpreter.install()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int8).item() == 127
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
