"""Threads that run one accelerated transformer at once get what each gets alone, bit for bit."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import tiny
import torch

import vidsparse

REPETITIONS = 6
SIZES = ((32, 64, 2), (64, 32, 4), (48, 32, 3))
"""Height, width and steps of each request: what leaks from one to another shows."""


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads change places often, and torch computes in the thread that asks."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Results of jobs that start at the same moment."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        torch.set_num_threads(1)
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def trace(pipe: Any) -> list[tuple[Any, ...]]:
    report = vidsparse.run_report(pipe)
    return [
        (call.step, report.steps, call.branch, call.reason, call.layer, call.density)
        for call in report.calls
    ]


def embedded(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Arguments without prompts: the tokenizer's truncation is state that threads share."""
    del call["prompt"], call["negative_prompt"], call["height"], call["width"]
    texts = pipe.encode_prompt("a monkey dances", "bad quality", max_sequence_length=8)
    return {**call, "prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}


def request(pipe: Any, name: str, number: int, call: dict[str, Any]) -> Any:
    """One request on a copy of its own: its latents and its report."""
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    height, width, steps = SIZES[number]
    arguments = {**call, "height": height, "width": width, "num_inference_steps": steps}
    if name == "wan_v2v":  # the VAE keeps what it encodes: give latents
        generator = torch.Generator().manual_seed(1)
        size = (1, 16, 3, height // 8, width // 8)
        arguments |= {"latents": torch.randn(size, generator=generator), "video": None}
        arguments |= {"strength": 1.0}
    out = twin(**arguments, output_type="latent", generator=torch.Generator().manual_seed(number))
    return out[0], trace(twin)


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_v2v"])
def test_request_copies_in_threads(name: str) -> None:
    pipe, call = tiny.build(name)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    call = embedded(pipe, call)
    alone = [request(pipe, name, number, call) for number in range(3)]
    assert len({str(calls) for _, calls in alone}) == 3
    assert all({c[2] for c in calls} == {"cond", "uncond"} for _, calls in alone)
    for _ in range(REPETITIONS):
        jobs = [lambda n=number: request(pipe, name, n, call) for number in range(3)]
        for (out, calls), (expected, expected_calls) in zip(together(jobs), alone, strict=True):
            assert calls == expected_calls
            assert torch.equal(out, expected)


def test_loops_that_tell_their_steps_in_threads() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)

    def loop(number: int) -> Any:
        outs, calls = [], []
        arguments = tiny.forward_arguments(grid=(3, 4 - number, 4), seed=number)
        for i in range(2 + number):
            branch = ("cond", "uncond", "both")[number]
            with vidsparse.step(i, 2 + number, branch), torch.no_grad():
                outs.append(pipe.transformer(**arguments)[0])
                calls = trace(pipe)
        return torch.stack(outs), calls

    alone = [loop(number) for number in range(3)]
    for _ in range(REPETITIONS):
        found = together([lambda n=number: loop(n) for number in range(3)])
        for (out, calls), (expected, expected_calls) in zip(found, alone, strict=True):
            assert calls == expected_calls and torch.equal(out, expected)


def test_contexts_of_threads_are_their_own() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    model, inside = pipe.transformer, threading.Barrier(2)

    def forward(name: str) -> set[str | None]:
        with model.cache_context(name), vidsparse.step(1, 3), torch.no_grad():
            inside.wait()
            model(**tiny.forward_arguments())
            inside.wait()
            return {call.context_name for call in vidsparse.run_report(pipe).calls}

    names = ("cond", "uncond")
    assert together([lambda n=name: forward(n) for name in names]) == [{n} for n in names]


def test_a_run_that_goes_on_in_another_thread() -> None:
    """As a server does that takes each step of a generator in a thread of its pool."""

    class Streaming(diffusers.WanPipeline):
        def stream(self, count: int) -> Iterator[None]:
            self.scheduler.set_timesteps(count)
            x = torch.zeros(1, 16, 3, 8, 12)
            for t in self.scheduler.timesteps:
                noise = tiny.forward(self.transformer)
                x = self.scheduler.step(noise, t, x).prev_sample
                yield

    pipe, _ = tiny.build("wan")
    pipe = vidsparse.accelerate_pipeline(Streaming.from_pipe(pipe), tiny.SPARSE)
    steps = pipe.stream(4)
    for _ in range(4):
        together([lambda: next(steps)])
    assert [call[:2] for call in trace(pipe)][::2] == [(i, 4) for i in range(4)]
