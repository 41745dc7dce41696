"""What devices that share a video compute and send: against one, and against real processes."""

from dataclasses import replace

import parallel_acts as acts
import pytest
import tiny
from ranks import on_ranks
from typer.testing import CliRunner

from vidsparse import TokenGrid, cli
from vidsparse.costs import gpus, sharing, stages
from vidsparse.costs.memory import memory
from vidsparse.costs.run import predict
from vidsparse.costs.stage import EXCHANGE
from vidsparse.generate.request import Request
from vidsparse.pipelines.anatomy import forward_of
from vidsparse.pipelines.families.wan import ADAPTER
from vidsparse.predict.subject import subject

WAN = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.fixture(scope="module")
def plan():
    return subject(Request(model=WAN), "bf16").plan


def test_what_is_sent_follows_from_the_sizes(plan):
    """q, k, v and the output of 75,600 tokens, 5,120 channels, 2 bytes; of n parts one stays."""
    whole = 4 * 75_600 * 5_120 * 2
    assert sharing.sent(plan.forward, 1) == 0
    assert sharing.sent(plan.forward, 2) == whole / 2 / 2
    assert sharing.sent(plan.forward, 8) == whole / 8 * 7 / 8
    (link, copies) = sharing.exchange(plan.forward, 8)
    assert link.sent == whole / 8 * 7 / 8 and copies.bytes == 4 * whole / 8
    joint = replace(plan.forward, grid=TokenGrid(21, 45, 80, text_tokens=512))
    assert sharing.exchange(joint, 8)[1].bytes == 6 * (whole / 75_600 * 76_112) / 8


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_all_of_them_together_do_what_one_does(plan, devices):
    """But for what each does by itself: the layers over the text and the timestep."""
    one, own = plan.forward, sharing.outside(plan.forward, devices)
    alone = sum(o.flops for o in one.linears if o.rows != one.tokens)
    shared = sum(o.flops for o in one.linears) - alone
    assert sum(o.flops for o in own.linears) == pytest.approx(alone + shared / devices)
    assert own.cross == one.cross / devices and own.tokens == 75_600 // devices
    inside = sharing.inside(one, devices)
    (dense,), (part,) = stages.dense_layer(one), stages.dense_layer(inside)
    assert part.flops == dense.flops / devices and part.exps == dense.exps / devices


def test_more_devices_take_less_time_and_never_less_than_their_share(plan):
    machine = gpus.named("H100")
    one = predict(plan, machine)
    last = one
    for devices in (2, 4, 8):
        found = predict(replace(plan, devices=devices), machine)
        for arm in ("dense_run", "sparse_run"):
            seconds, whole = getattr(found, arm).seconds, getattr(one, arm).seconds
            assert whole / devices < seconds < getattr(last, arm).seconds
        assert found.sparse_step.stages[EXCHANGE] > 0
        assert found.dense_step.limit(EXCHANGE) in ("link", "bandwidth")
        last = found
    assert EXCHANGE not in one.sparse_step.stages


def test_memory_is_of_each_device(plan):
    method = predict(plan, gpus.named("H100")).method
    one, four = (memory(plan.forward, method, 10, devices) for devices in (1, 4))
    assert one["weights"] == four["weights"]
    assert one["activations"] / 4 < four["activations"] < one["activations"]
    assert four["sparse buffers"] == one["sparse buffers"] / 4


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "H100", "--ulysses", "7"], "--ulysses 7: 40 attention heads"),
        (["--gpu", "H100", "--ulysses", "0"], "--ulysses 0"),
        (["--ulysses", "2"], "name GPUs, as --gpu H100"),
    ],
)
def test_what_cannot_be_predicted(words, said):
    done = CliRunner().invoke(cli.app, ["predict", "--model", WAN, *words], prog_name="vidsparse")
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1


def test_a_person_reads_what_is_sent():
    words = ["predict", "--model", WAN, "--gpu", "H200", "--ulysses", "4"]
    done = CliRunner().invoke(cli.app, words, prog_name="vidsparse")
    assert "4 of them share each video; each sends 46.4 GB a step" in done.stdout
    assert "exchange between devices" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_two_processes_send_what_is_counted_and_compute_a_half(capsys):
    """Bytes by counting them, seconds of CPU time, which others on the machine do not change."""
    grids = [(4, 12, 16), (8, 16, 24)]
    model = tiny.transformer(heads=acts.HEADS, head_dim=64)
    ranks = on_ranks(2, acts.measured, grids, limit=400)
    for n, grid in enumerate(grids):
        forward = forward_of(model, ADAPTER, TokenGrid(*grid), 16, "float32")
        for found in ranks:
            assert found[n]["sent"] == sharing.sent(forward, 2) * forward.layers
        one, two = ranks[0][n]["one"], max(found[n]["two"] for found in ranks)
        with capsys.disabled():
            print(
                f"\n{forward.tokens:,} tokens: CPU seconds of a forward {one:.2f} in one process, "
                f"{two:.2f} in the busier of two; each sends {ranks[0][n]['sent'] / 1e6:.1f} MB"
            )
    assert 0.45 < two / one < 0.75, "of the longer"
