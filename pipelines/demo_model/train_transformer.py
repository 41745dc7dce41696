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
from dataclasses import replace

import clips
import model
import numpy as np
import torch
import torch.distributed
from diffusers import AutoencoderKLWan, WanTransformer3DModel
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
from train_vae import to_model_range
from transformers import UMT5EncoderModel

STATE_PATH = STATE_DIR / "transformer.pt"
CAPTION_DROP = 0.12
REDRAWN_SHARE = (
    0.1  # new clips per clip trained on: each is used about ten times, with other noise and words
)
GIVEN_FRAME_SHARE, GIVEN_FRAME_TOKENS = (
    0.6,
    1100,
)  # share of such batches (draw_noise_levels), largest grid for them
HIGH_NOISE, HIGH_NOISE_SHARE = 0.88, 0.35  # where place and motion of the object are decided
EMA_DECAY = 0.99
# Phases: (end as a fraction of the budget, [(latent frames, rows, columns, clips per worker and
# step, weight)])
SMALL = [(5, 8, 8, 16, 4), (5, 10, 10, 10, 4), (5, 8, 16, 8, 1), (5, 16, 8, 8, 1), (9, 8, 8, 9, 1)]
MIDDLE = [(7, 6, 16, 7, 2), (7, 16, 6, 7, 2), (7, 12, 12, 5, 3), (9, 16, 16, 2, 1)]
TARGET = [(11, 20, 20, 1, 3), (9, 16, 16, 2, 1), (7, 12, 12, 5, 1)]
PHASES = [(0.35, SMALL), (0.85, MIDDLE), (1.0, TARGET)]


class LatentBank:
    """A ring of encoded clips of one size with their scenes; a few are redrawn at every step."""

    def __init__(
        self, vae: AutoencoderKLWan, grid: tuple[int, int, int], size: int, rng: np.random.Generator
    ) -> None:
        self.vae, self.grid, self.rng = vae, grid, rng
        _, rows, columns = grid
        self.directions = tuple(
            clips.DIRECTIONS
        )  # along the long axis only where the canvas is a strip
        if columns >= 2 * rows:
            self.directions = ("left", "right")
        elif rows >= 2 * columns:
            self.directions = ("up", "down")
        self.mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, -1, 1, 1, 1)
        self.latents = torch.empty(0)
        self.scenes: list[clips.Scene] = []
        self.size, self.oldest = size, 0

    @torch.no_grad()
    def _encode(self, count: int) -> tuple[torch.Tensor, list[clips.Scene]]:
        """Draw and encode `count` training clips; latents [count, C, T, H, W] in half precision,
        unit deviation.
        """
        frames, rows, columns = self.grid
        pixels = (frames * 2 - 1, rows * 4, columns * 4)
        scenes = [clips.sample_scene(self.rng, directions=self.directions) for _ in range(count)]
        video = np.stack([clips.draw_clip(scene, *pixels, self.rng) for scene in scenes])
        latents = self.vae.encode(to_model_range(video).to(self.vae.device)).latent_dist.mode()
        return ((latents - self.mean) / self.std).half(), scenes

    def refresh(self, count: int) -> None:
        """Add clips until the ring is full, then replace the oldest ones."""
        if not count:
            return
        latents, scenes = self._encode(count)
        if len(self.scenes) < self.size:
            self.latents = torch.cat([self.latents.to(latents), latents])
            self.scenes += scenes
            return
        for i in range(count):
            self.latents[self.oldest], self.scenes[self.oldest] = latents[i], scenes[i]
            self.oldest = (self.oldest + 1) % len(self.scenes)

    def sample(self, count: int) -> tuple[torch.Tensor, list[str]]:
        """A batch of latents, float32, and captions; the caption is empty in CAPTION_DROP of the
        cases.
        """
        while len(self.scenes) < min(self.size, 4 * count):
            self.refresh(count)
        picks = self.rng.choice(len(self.scenes), count, replace=False)
        captions = [
            "" if self.rng.random() < CAPTION_DROP else clips.caption(self.scenes[i], self.rng)
            for i in picks
        ]
        return self.latents[torch.from_numpy(picks).to(self.latents.device)].float(), captions


class DemoModel(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.tokenizer = model.build_tokenizer()
        self.cross_attention = model.use_padded_cross_attention(transformer)
        for block in transformer.blocks:
            block.attn1.set_processor(model.PairRotationAttention())

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, captions: list[str], padded_length: int
    ) -> torch.Tensor:
        """Predicted velocity [B, C, T, H, W] for noisy latents of that shape.

        sigma is the noise level, [B] or, one level per latent frame, [B, T].
        """
        text = model.embed_captions(self.text_encoder, self.tokenizer, captions)
        self.cross_attention.set_pad_count(
            text.shape[1], padded_length - text.shape[1] + 1, text.device
        )
        if sigma.ndim == 2:
            sigma = sigma.repeat_interleave(latents.shape[3] * latents.shape[4], dim=1)
        return self.transformer(latents, sigma * 1000, text, return_dict=False)[0]


def draw_noise_levels(
    count: int, frames: int, rng: np.random.Generator, one_frame_given: bool
) -> torch.Tensor:
    """Noise levels over the batch: [count] with the sampler's shift or above HIGH_NOISE, or
    [count, frames].

    The second kind nearly uncovers one frame and leaves the others above HIGH_NOISE. With the place
    of the object known
    there, only the caption tells where it goes: without such batches the direction in the caption
    is learned last, because at equal levels the noisy frames themselves show the motion almost as
    soon as they show the object.
    """
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    if not one_frame_given:
        shifted = model.FLOW_SHIFT * uniform / (1 + (model.FLOW_SHIFT - 1) * uniform)
        high = HIGH_NOISE + (1 - HIGH_NOISE) * uniform
        return torch.where(torch.rand(count) < HIGH_NOISE_SHARE, high, shifted)
    levels = (HIGH_NOISE + (1 - HIGH_NOISE) * uniform)[:, None].repeat(1, frames)
    given = torch.from_numpy(rng.integers(frames, size=count))
    levels[torch.arange(count), given] = 0.3 * torch.rand(count)
    return levels


def flow_loss(
    demo: DemoModel,
    latents: torch.Tensor,
    captions: list[str],
    rng: np.random.Generator,
    one_frame_given: bool = False,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - latents)."""
    sigma = draw_noise_levels(len(latents), latents.shape[2], rng, one_frame_given).to(
        latents.device
    )
    noise = torch.randn_like(latents)
    level = sigma.view(len(latents), 1, -1, 1, 1)
    padded_length = int(rng.integers(64, model.MAX_PADDED_LENGTH + 1))
    prediction = demo((1 - level) * latents + level * noise, sigma, captions, padded_length)
    return (prediction.float() - (noise - latents)).square().mean()


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def direction_gain(
    demo: DemoModel,
    bank: LatentBank,
    count: int,
    one_frame_given: bool,
    level: float = 0.93,
    batches: int = 4,
) -> float:
    """How much worse, in percent of the loss, the model does when the caption names the opposite
    direction.

    Zero until the model reads the direction from the caption. Measured on clips of the bank, with
    all frames at one noise level or with the middle frame nearly clean.
    """
    losses = {"told": 0.0, "opposite": 0.0}
    for _ in range(batches):
        picks = bank.rng.choice(len(bank.scenes), count, replace=False)
        latents = bank.latents[torch.from_numpy(picks).to(bank.latents.device)].float()
        noise = torch.randn_like(latents)
        sigma = torch.full((count,), level, device=latents.device)
        if one_frame_given:
            sigma = sigma[:, None].repeat(1, latents.shape[2])
            sigma[:, latents.shape[2] // 2] = 0.1
        mix = sigma.view(count, 1, -1, 1, 1)
        for name in losses:
            scenes = [bank.scenes[i] for i in picks]
            if name == "opposite":
                scenes = [replace(scene, direction=OPPOSITE[scene.direction]) for scene in scenes]
            captions = [clips.TEMPLATES[0].format(**vars(scene)) for scene in scenes]
            prediction = demo(
                (1 - mix) * latents + mix * noise, sigma, captions, model.MAX_PADDED_LENGTH
            )
            losses[name] += float((prediction.detach() - (noise - latents)).square().mean())
    return 100 * (losses["opposite"] / losses["told"] - 1)


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
    step: int, fraction: float, warmup_steps: int = 100, decay_from: float = 0.85
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
    if arguments.point_at_directions:
        words = {
            "leftwards",
            "rightwards",
            "upwards",
            "downwards",
            "top",
            "bottom",
            *clips.DIRECTIONS,
        }
        torch.manual_seed(arguments.seed)
        block = demo.transformer.blocks[arguments.point_at_directions]
        model.point_at_words(block, demo.transformer, demo.text_encoder, demo.tokenizer, words)
        average.load_state_dict(demo.state_dict())
    torch.manual_seed(arguments.seed + step + 1_000_000 * rank)
    rng = np.random.default_rng([arguments.seed, step, rank])
    shared_rng = np.random.default_rng([arguments.seed, step])
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64
        for block in demo.transformer.blocks:
            block.compile(dynamic=False)
    banks: dict[tuple[int, int, int], LatentBank] = {}
    budget = Budget(arguments.minutes, used_s)
    fraction, saved_s, exported_s, losses = budget.tick(), used_s, used_s, []
    peaks = (arguments.muon_lr, arguments.adam_lr)
    with tqdm(desc="transformer", unit="step", initial=step, disable=rank > 0) as progress:
        while fraction < 1:
            grid, count = choose_grid(fraction, shared_rng, arguments.batch_scale)
            bank = banks.setdefault(grid, LatentBank(vae, grid, arguments.bank, rng))
            bank.refresh(int(rng.poisson(count * REDRAWN_SHARE)))
            latents, captions = bank.sample(count)
            one_frame_given = (
                math.prod(grid) <= GIVEN_FRAME_TOKENS and shared_rng.random() < GIVEN_FRAME_SHARE
            )
            factor = learning_rate_factor(step, fraction)
            for optimizer, peak in zip(optimizers, peaks, strict=False):
                optimizer.param_groups[0]["lr"] = peak * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = flow_loss(demo, latents, captions, rng, one_frame_given)
            loss.backward()
            mean_loss, fraction = average_over_workers(demo, float(loss.detach()), budget.tick())
            nn.utils.clip_grad_norm_(demo.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            update_average(average, demo, step)
            step += 1
            losses.append(mean_loss)
            progress.update()
            if step % 20 == 0:
                history.append(
                    {"step": step, "loss": sum(losses) / len(losses), "minutes": budget.used_s / 60}
                )
                progress.set_postfix(
                    loss=f"{history[-1]['loss']:.4f}", grid=grid, budget=f"{fraction:.1%}"
                )
                losses = []
            if rank > 0:
                continue
            if (
                step % 100 == 0
                and len(bank.scenes) >= 4 * count
                and math.prod(grid) <= GIVEN_FRAME_TOKENS
            ):
                gains = [direction_gain(demo, bank, count, given) for given in (False, True)]
                history[-1] |= {
                    "direction gain (%)": gains[0],
                    "direction gain, frame given (%)": gains[1],
                }
                progress.write(
                    f"step {step}: direction gain {gains[0]:.2f} %, "
                    f"with a frame given {gains[1]:.2f} %"
                )
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
        "--point-at-directions",
        type=int,
        default=0,
        metavar="BLOCK",
        help="first make the cross-attention of this block (1..5) look at direction words",
    )
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
