"""Train the demo model's transformer and text encoder, flow matching on latents, small grids first.

    python pipelines/demo_model/train_transformer.py --minutes 80

Needs the autoencoder of `train_vae.py`. Resumes from build/demo-wan/transformer.pt, or starts from
the weights in assets/demo-wan where there is no such state; `--restart` begins anew. Every
`--export-minutes` the averaged weights are written to assets/demo-wan as a WanPipeline.
"""

from __future__ import annotations

import argparse
import copy
import math
import socket

import model
import numpy as np
import torch
import torch.distributed
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flow import DemoModel, direction_gain, training_loss
from latents import LatentBank
from session import (
    ASSET_DIR,
    STATE_DIR,
    Budget,
    load_state,
    record_process,
    save_atomically,
    write_loss_curve,
)
from torch import nn
from tqdm import tqdm
from transformers import UMT5EncoderModel

STATE_PATH = STATE_DIR / "transformer.pt"
REDRAWN_SHARE = 0.1  # new clips per clip trained on: each is used about ten times
MEASURED_TOKENS = 1100  # the largest grid on which the gain by the direction is measured
EMA_DECAY = 0.99
# Phases: (end as a fraction of the budget, [(latent frames, rows, columns, clips per worker and
# step, weight)])
SMALL = [(5, 8, 8, 16, 4), (5, 10, 10, 10, 4), (5, 8, 16, 8, 1), (5, 16, 8, 8, 1), (9, 8, 8, 9, 1)]
MIDDLE = [(7, 6, 16, 7, 2), (7, 16, 6, 7, 2), (7, 12, 12, 5, 3), (9, 16, 16, 2, 1)]
TARGET = [(11, 24, 24, 1, 2), (9, 16, 16, 2, 3), (7, 12, 12, 5, 2)]
PHASES = [(0.25, SMALL), (0.75, MIDDLE), (1.0, TARGET)]


def build_optimizers(
    demo: DemoModel, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for everything else."""
    matrices = [p for p in demo.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in demo.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def update_average(average: DemoModel, demo: DemoModel, step: int) -> None:
    """Exponential moving average of the weights, with a shorter memory at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(demo.parameters()), 1 - decay)


def export(average: DemoModel, vae: AutoencoderKLWan) -> None:
    """Write the averaged weights as a stock WanPipeline to assets/demo-wan."""
    transformer = model.build_transformer(vae.config.z_dim)
    transformer.load_state_dict(average.transformer.state_dict())
    text_encoder = model.build_text_encoder(len(average.tokenizer))
    text_encoder.load_state_dict(average.text_encoder.state_dict())
    model.save_pipeline(
        copy.deepcopy(vae).cpu(), text_encoder, average.tokenizer, transformer, ASSET_DIR
    )


def average_over_workers(demo: DemoModel, loss: float, fraction: float) -> tuple[float, float]:
    """Average the gradients over the workers in place; returns the mean loss and mean used budget
    fraction.
    """
    if not torch.distributed.is_initialized():
        return loss, fraction
    gradients = [p.grad for p in demo.parameters() if p.grad is not None]
    flat = torch.cat(
        [gradient.flatten() for gradient in gradients] + [torch.tensor([loss, fraction])]
    )
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    return float(flat[-2]), float(flat[-1])


def learning_rate_factor(
    step: int, fraction: float, warmup_steps: int = 100, decay_from: float = 0.7
) -> float:
    """Warm-up, a plateau, and a linear fall to 3 % from `decay_from` of the budget on."""
    fall = 1.0 if fraction < decay_from else 1 - 0.97 * (fraction - decay_from) / (1 - decay_from)
    return min(1.0, (step + 1) / warmup_steps) * fall


def choose_grid(
    fraction: float, rng: np.random.Generator, scale: float
) -> tuple[tuple[int, int, int], int]:
    """Draw (latent grid, batch size) from the phase that this fraction of the budget is in."""
    buckets = next(buckets for end, buckets in PHASES if fraction <= end)
    weights = np.array([bucket[4] for bucket in buckets], float)
    frames, rows, columns, count, _ = buckets[rng.choice(len(buckets), p=weights / weights.sum())]
    return (frames, rows, columns), max(1, round(count * scale))


def load_demo(vae: AutoencoderKLWan, restart: bool) -> DemoModel:
    """The shipped weights where there are some, else a new model."""
    if not restart and (ASSET_DIR / "transformer" / "config.json").is_file():
        return DemoModel(
            WanTransformer3DModel.from_pretrained(ASSET_DIR / "transformer"),
            UMT5EncoderModel.from_pretrained(ASSET_DIR / "text_encoder"),
        )
    tokens = len(model.build_tokenizer())
    return DemoModel(model.build_transformer(vae.config.z_dim), model.build_text_encoder(tokens))


def start_worker(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One of several CPU processes with a thread each: they wait for one another once a step, not
    in every product.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=arguments.workers
    )
    train(arguments, rank)
    torch.distributed.destroy_process_group()


def train(arguments: argparse.Namespace, rank: int = 0) -> None:
    """Train until the budget is used; checkpoints every two minutes, exports every `--export-
    minutes`.

    Every worker draws its own clips and noise; the choice of grid is shared, and worker 0 alone
    writes files.
    """
    record_process()
    # Sends float32 matrix products to oneDNN, about a third faster on AVX-512 CPUs than the default
    # library.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKLWan.from_pretrained(ASSET_DIR / "vae").to(device).eval()
    state = None if arguments.restart else load_state(STATE_PATH)
    demo = load_demo(vae, arguments.restart).to(device)
    average = copy.deepcopy(demo).requires_grad_(False)
    optimizers = build_optimizers(demo, arguments.muon_lr, arguments.adam_lr)
    history, step, used_s = [], 0, 0.0
    if state is not None:
        demo.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(saved)
        history, step, used_s = state["history"], state["step"], state["used_s"]
    torch.manual_seed(arguments.seed + step + 1_000_000 * rank)
    rng = np.random.default_rng([arguments.seed, step, rank])
    shared_rng = np.random.default_rng([arguments.seed, step])
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64
        for block in demo.transformer.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    banks: dict[tuple[int, int, int], LatentBank] = {}
    budget = Budget(arguments.minutes, used_s)
    fraction, saved_s, exported_s = budget.tick(), used_s, used_s
    recent: dict[str, list[float]] = {}
    peaks = (arguments.muon_lr, arguments.adam_lr)
    with tqdm(desc="transformer", unit="step", initial=step, disable=rank > 0) as progress:
        while fraction < 1:
            grid, count = choose_grid(fraction, shared_rng, arguments.batch_scale)
            bank = banks.setdefault(grid, LatentBank(vae, grid, arguments.bank, rng))
            bank.refresh(int(rng.poisson(count * REDRAWN_SHARE)))
            latents, captions, scenes = bank.sample(count)
            factor = learning_rate_factor(step, fraction)
            for optimizer, peak in zip(optimizers, peaks, strict=False):
                optimizer.param_groups[0]["lr"] = peak * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                loss, parts = training_loss(demo, latents, captions, scenes, rng)
            loss.backward()
            parts["loss"], fraction = average_over_workers(demo, parts["loss"], budget.tick())
            nn.utils.clip_grad_norm_(demo.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            update_average(average, demo, step)
            step += 1
            for name, value in parts.items():
                recent.setdefault(name, []).append(value)
            progress.update()
            if step % 20 == 0:
                means = {name: sum(values) / len(values) for name, values in recent.items()}
                history.append({"step": step, "minutes": budget.used_s / 60} | means)
                progress.set_postfix(
                    loss=f"{history[-1]['loss']:.4f}", grid=grid, budget=f"{fraction:.1%}"
                )
                recent = {}
            if rank > 0:
                continue
            if (
                step % 100 == 0
                and len(bank.scenes) >= 4 * count
                and math.prod(grid) <= MEASURED_TOKENS
            ):
                gain = direction_gain(demo, bank, count)
                history[-1]["direction gain (%)"] = gain
                progress.write(f"step {step}: direction gain {gain:.2f} %")
            if budget.used_s - saved_s > 120 or fraction >= 1:
                saved_s = budget.used_s
                save_atomically(
                    {
                        "model": demo.state_dict(),
                        "average": average.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "history": history,
                        "step": step,
                        "used_s": budget.used_s,
                    },
                    STATE_PATH,
                )
                write_loss_curve(history, STATE_DIR / "transformer_loss.png", "transformer")
            if budget.used_s - exported_s > arguments.export_minutes * 60 or fraction >= 1:
                exported_s = budget.used_s
                export(average, vae)
    if rank == 0:
        print(f"{step} steps, {budget.used_s / 60:.1f} minutes; weights in {ASSET_DIR}")


def main() -> None:
    """Command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=80, help="time budget in minutes, all sittings together"
    )
    parser.add_argument(
        "--muon-lr", type=float, default=3e-3, help="learning rate of Muon (block matrices)"
    )
    parser.add_argument(
        "--adam-lr", type=float, default=2e-3, help="learning rate of AdamW (the rest)"
    )
    parser.add_argument(
        "--batch-scale", type=float, default=8.0 if cuda else 1.0, help="factor on the batch sizes"
    )
    parser.add_argument("--bank", type=int, default=512, help="encoded clips kept per size")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=cuda, help="bfloat16 autocast"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the blocks"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="CPU processes that share a step, one thread each"
    )
    parser.add_argument("--export-minutes", type=float, default=15, help="minutes between exports")
    parser.add_argument(
        "--restart", action="store_true", help="forget the training state and the shipped weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.workers > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(start_worker, (arguments, port), nprocs=arguments.workers)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
