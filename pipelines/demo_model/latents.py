"""Encoded training clips, kept in memory and replaced little by little."""

from __future__ import annotations

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from train_vae import to_model_range

CAPTION_DROP = 0.12


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

    def sample(self, count: int) -> tuple[torch.Tensor, list[str], list[clips.Scene | None]]:
        """A batch: latents in float32, captions, scenes.

        In CAPTION_DROP of the cases the caption is empty and the scene None.
        """
        while len(self.scenes) < min(self.size, 4 * count):
            self.refresh(count)
        picks = self.rng.choice(len(self.scenes), count, replace=False)
        scenes = [None if self.rng.random() < CAPTION_DROP else self.scenes[i] for i in picks]
        captions = [clips.caption(scene, self.rng) if scene else "" for scene in scenes]
        return (
            self.latents[torch.from_numpy(picks).to(self.latents.device)].float(),
            captions,
            scenes,
        )
