"""How a CPU's crossover is timed: rounds, noise, periods, threads that others had."""

import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vidsparse.kernels.cpu import crossover as cpu_crossover
from vidsparse.kernels.cpu import store
from vidsparse.kernels.cpu.crossover import MARGIN, Times


def test_crossover_by_hand() -> None:
    """Noise of a tenth moves it as far as a tenth less of dense time does."""
    times = Times(dense=10.0, sparse=(4.0, 8.0), noise=0.0)
    assert times.crossover() == pytest.approx(0.2 + (10 * (1 - MARGIN) - 4) / 10)
    noisy = Times(dense=10.0, sparse=(4.0, 8.0), noise=0.1)
    assert noisy.crossover() == pytest.approx(times.crossover() - 0.1)
    assert Times(dense=9.0, sparse=(1.0, 1.0), noise=0.0).crossover() == 2.0


class Work:
    """Dense, sparse and sparser work of known seconds, on a clock of its own, that take `slowed`
    times as long."""

    def __init__(self, slowed: Callable[[int], float]) -> None:
        self.now, self.done, self.slowed = 0.0, 0, slowed
        self.acts = tuple(lambda s=s: self.pass_by(s) for s in (0.020, 0.010, 0.018))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds * self.slowed(self.done)
        self.done += 1

    def figures(self) -> dict[str, float]:
        return cpu_crossover._figures(self.acts, lambda: self.now)


def test_a_quiet_machine_is_timed_three_times() -> None:
    work = Work(lambda n: 1.0)
    found = work.figures()
    assert work.done == 3 * 3 and found["noise"] == pytest.approx(0)
    assert [found[name] for name in ("dense", "sparse_low", "sparse_high")] == pytest.approx(
        [0.020, 0.010, 0.018]
    )


def test_a_fresh_call_of_a_period_is_spread_over_it() -> None:
    """One of 26 ms among three of 10 ms, and of 18 ms: 14 ms and 22 ms on average."""
    work = Work(lambda n: 1.0)
    work.acts = (*work.acts, lambda: work.pass_by(0.026))
    found = cpu_crossover._figures(work.acts, lambda: work.now, 4)
    assert work.done == 4 * 3 and found["noise"] == pytest.approx(0)
    assert [found[name] for name in ("dense", "sparse_low", "sparse_high")] == pytest.approx(
        [0.020, 0.014, 0.022]
    )


def test_what_slows_the_whole_machine_is_no_noise() -> None:
    """A clock rate that falls from round to round; the shortest dense time has company."""
    found = Work(lambda n: 1.0 + 0.5 * (n // 3)).figures()
    assert found["sparse_low"] / found["dense"] == pytest.approx(0.5)
    assert found["noise"] == pytest.approx(0)


def test_a_busy_machine_is_timed_for_longer_and_believed_less() -> None:
    """Each call is slowed by another factor, up to two; `SECONDS` end it, and the noise is told."""
    chance = random.Random(0)
    work = Work(lambda n: 1.0 + chance.random())
    found = work.figures()
    assert found["noise"] > cpu_crossover.QUIET
    assert cpu_crossover.SECONDS < work.now < cpu_crossover.SECONDS + 0.1
    times = Times(found["dense"], (found["sparse_low"], found["sparse_high"]), found["noise"])
    truth = Times(0.020, (0.010, 0.018), 0.0)
    assert times.crossover() < truth.crossover()


def test_noise_of_calls_far_slower_than_dense_is_not_a_busy_machine() -> None:
    """Sparse at ten times dense, give or take a twentieth: no reason to measure again."""
    chance = random.Random(1)
    work = Work(lambda n: 1.0 if n % 3 == 0 else 10.0 + chance.uniform(-0.5, 0.5))
    found = work.figures()
    assert found["noise"] < cpu_crossover.LOUD / 2
    assert found["sparse_low"] > 4 * found["dense"]


def test_noise_is_the_standard_error_of_the_median() -> None:
    """Against the spread of medians of many samples of a normal distribution, by simulation."""
    for count in (3, 5, 9, 25):
        samples = torch.randn(4000, count, generator=torch.Generator().manual_seed(count))
        found = statistics.fmean(map(cpu_crossover.standard_error, samples.tolist()))
        spread = float(samples.median(1).values.std())
        assert 0.85 * spread < found < 1.4 * spread


def test_threads_that_others_had_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two threads this process got half: quiet figures, but not of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours, ticks = [0.5], [0.0]

    def figures(*_: object) -> dict[str, float]:
        ticks[0] += 1.0
        return dict(zip(cpu_crossover.FIGURES, (1.0, 0.3, 0.6, 0.001), strict=True))

    monkeypatch.setattr(cpu_crossover, "_figures", figures)
    monkeypatch.setattr(cpu_crossover.time, "perf_counter", lambda: ticks[0])
    monkeypatch.setattr(cpu_crossover.time, "process_time", lambda: 2 * ours[0] * ticks[0])
    kind = cpu_crossover.Kind("float32", 16, 2, 2, "")
    with pytest.raises(store.Unmeasured, match="50% of its threads were ours"):
        cpu_crossover.measure(kind, 1024, lambda *_, **how: None)
    alone = cpu_crossover.Kind("float32", 16, 2, 1, "")
    assert cpu_crossover.measure(alone, 1024, lambda *_, **how: None)["dense"] == 1.0
    ours[0] = 0.9
    assert cpu_crossover.measure(kind, 1024, lambda *_, **how: None)["noise"] == 0.001
