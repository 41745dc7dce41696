"""Train the demo model's AutoencoderKLWan (4 x 4 x 2 compression) on clips that `clips.py` draws.

    python pipelines/demo_model/train_vae.py --minutes 20

Resumes from build/demo-wan/vae.pt; `--restart` begins anew. At the end of the budget the
autoencoder, with the mean and deviation of its latents measured, is written to assets/demo-wan/vae.
"""

from __future__ import annotations

import argparse
import math

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from session import (
    ASSET_DIR,
    STATE_DIR,
    Budget,
    forget_origin,
    load_state,
    record_process,
    save_atomically,
    warmup_cosine,
    write_loss_curve,
)
from tqdm import tqdm

LATENT_CHANNELS = 8
# (frames, height, width, clips in a batch), the chance of each bucket stands beside it
BUCKETS = (((5, 32, 32, 16), 0.8), ((9, 32, 48, 6), 0.1), ((13, 48, 48, 3), 0.1))
KL_WEIGHT = 2e-5
STATE_PATH = STATE_DIR / "vae.pt"


def build_vae() -> AutoencoderKLWan:
    """A small autoencoder in the residual layout of Wan 2.2; 4-pixel and 2-frame latent cells."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def to_model_range(video: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] to float [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_batch(
    shape: tuple[int, int, int, int], rng: np.random.Generator, held_out: bool = False
) -> torch.Tensor:
    """Clips of shape (frames, height, width, count) as float [B, 3, F, H, W] in -1..1."""
    frames, height, width, count = shape
    scenes = [clips.sample_scene(rng, held_out) for _ in range(count)]
    return to_model_range(
        np.stack([clips.draw_clip(scene, frames, height, width, rng) for scene in scenes])
    )


def reconstruction_loss(
    vae: AutoencoderKLWan, video: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mean squared error in -1..1 units): L1 + MSE, plus a light pull of the latents to a
    unit normal.
    """
    posterior = vae.encode(video).latent_dist
    error = vae.decode(posterior.sample()).sample - video
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    mse = error.square().mean()
    return error.abs().mean() + 2 * mse + KL_WEIGHT * divergence, mse.detach()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan, device: torch.device, count: int = 8) -> float:
    """Mean PSNR (dB, peak 1) over held-out clips of the default size."""
    rng = np.random.default_rng(99)
    shape = (clips.DEFAULT_FRAMES, clips.DEFAULT_HEIGHT, clips.DEFAULT_WIDTH, 1)
    values = []
    for _ in range(count):
        video = draw_batch(shape, rng, held_out=True).to(device)
        error = (vae.decode(vae.encode(video).latent_dist.mode()).sample - video) / 2
        values.append(-10 * math.log10(float(error.square().mean())))
    return sum(values) / len(values)


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, device: torch.device, count: int = 32
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over training clips."""
    rng = np.random.default_rng(7)
    latents = []
    for _ in range(count):
        video = draw_batch((clips.DEFAULT_FRAMES, 64, 64, 1), rng).to(device)
        latents.append(vae.encode(video).latent_dist.mode().transpose(0, 1).flatten(1))
    joined = torch.cat(latents, dim=1)
    return joined.mean(dim=1).tolist(), joined.std(dim=1).tolist()


def save_vae(vae: AutoencoderKLWan, device: torch.device) -> None:
    """Put the latents' statistics into the config, write the model to assets/demo-wan/vae."""
    mean, std = measure_latents(vae, device)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(ASSET_DIR / "vae", safe_serialization=True)
    forget_origin(ASSET_DIR / "vae")


def train(minutes: float, peak_lr: float, device: torch.device, restart: bool, seed: int) -> None:
    """Train until the budget is used; checkpoints every minute or so."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    state = None if restart else load_state(STATE_PATH)
    history, step, used_s = [], 0, 0.0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, step, used_s = state["history"], state["step"], state["used_s"]
    elif not restart and (ASSET_DIR / "vae" / "config.json").is_file():
        vae = AutoencoderKLWan.from_pretrained(ASSET_DIR / "vae").to(device)
        optimizer = torch.optim.AdamW(
            vae.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01
        )
    rng = np.random.default_rng(seed + step)
    budget = Budget(minutes, used_s)
    fraction, saved_s = budget.tick(), used_s
    shapes, chances = zip(*BUCKETS, strict=False)
    with tqdm(desc="VAE", unit="step", initial=step) as progress:
        while fraction < 1:
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * warmup_cosine(step, fraction, 200)
            video = draw_batch(shapes[rng.choice(len(shapes), p=chances)], rng).to(device)
            loss, mse = reconstruction_loss(vae, video)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, fraction = step + 1, budget.tick()
            progress.update()
            if step % 20 == 0:
                psnr = -10 * math.log10(float(mse) / 4)
                history.append(
                    {"step": step, "loss": float(loss.detach()), "PSNR, one batch (dB)": psnr}
                )
                progress.set_postfix(
                    loss=f"{float(loss.detach()):.4f}", psnr=f"{psnr:.1f}", budget=f"{fraction:.0%}"
                )
            if budget.used_s - saved_s > 60 or fraction >= 1:
                saved_s = budget.used_s
                save_atomically(
                    {
                        "model": vae.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "history": history,
                        "step": step,
                        "used_s": budget.used_s,
                    },
                    STATE_PATH,
                )
                write_loss_curve(history, STATE_DIR / "vae_loss.png", "VAE")
    save_vae(vae, device)
    print(f"{step} steps; held-out clips of the default size: {measure_psnr(vae, device):.2f} dB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=20, help="time budget in minutes, all sittings together"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: torch's choice")
    parser.add_argument(
        "--restart", action="store_true", help="forget the training state and the shipped weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record_process()
    train(
        arguments.minutes,
        arguments.lr,
        torch.device(arguments.device),
        arguments.restart,
        arguments.seed,
    )


if __name__ == "__main__":
    main()
