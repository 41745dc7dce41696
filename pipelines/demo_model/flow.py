"""The flow-matching objective of the demo model, and how far it listens to its captions."""

from __future__ import annotations

from dataclasses import replace

import clips
import model
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from latents import LatentBank
from torch import nn
from transformers import UMT5EncoderModel

HIGH_NOISE, HIGH_NOISE_SHARE = 0.9, 0.45  # where place and motion of the object are decided
READ_AFTER = (1, 3)  # blocks whose output is asked for the words of the caption
READ_WEIGHT = 0.1
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "direction": tuple(clips.DIRECTIONS),
    "shape": clips.SHAPES,
}


class WordReader(nn.Module):
    """Linear classifiers of the caption's ATTRIBUTES from the features of every single token.

    The flow loss alone leaves cross-attention blind to words that explain little of the picture:
    they get weights below 2 %, and so hardly any gradient. Asking every token what the caption
    said brings them in within some hundred steps. Thrown away after training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(words)) for name, words in ATTRIBUTES.items()}
        )

    def forward(
        self, hidden: torch.Tensor, scenes: list[clips.Scene | None]
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy (nats) per attribute for features [B, S, width]; scene None is left out."""
        rows = [i for i, scene in enumerate(scenes) if scene is not None]
        features = self.norm(hidden[rows].float())
        losses = {}
        for name, words in ATTRIBUTES.items():
            labels = torch.tensor(
                [words.index(getattr(scenes[i], name)) for i in rows], device=hidden.device
            )
            logits = self.heads[name](features).flatten(0, 1)
            labels = labels.repeat_interleave(hidden.shape[1])
            losses[name] = nn.functional.cross_entropy(logits, labels) if rows else logits.sum()
        return losses


class DemoModel(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.tokenizer = model.build_tokenizer()
        self.cross_attention = model.use_padded_cross_attention(transformer)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.readers = nn.ModuleList([WordReader(width) for _ in READ_AFTER])
        for block in transformer.blocks:
            block.attn1.set_processor(model.PairRotationAttention())

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, captions: list[str], padded_length: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Predicted velocity [B, C, T, H, W] for noisy latents of that shape, and the token
        features [B, S, width] behind each block of READ_AFTER.

        sigma [B] is the noise level, 0 (data) to 1 (noise).
        """
        text = model.embed_captions(self.text_encoder, self.tokenizer, captions)
        self.cross_attention.set_pad_count(
            text.shape[1], padded_length - text.shape[1] + 1, text.device
        )
        features: list[torch.Tensor] = []
        hooks = [
            self.transformer.blocks[i].register_forward_hook(
                lambda _module, _args, output: features.append(output)
            )
            for i in READ_AFTER
        ]
        try:
            velocity = self.transformer(latents, sigma * 1000, text, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return velocity, features


def draw_noise_levels(count: int) -> torch.Tensor:
    """Noise levels [count], stratified: with the sampler's shift, or above HIGH_NOISE."""
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    shifted = model.FLOW_SHIFT * uniform / (1 + (model.FLOW_SHIFT - 1) * uniform)
    high = HIGH_NOISE + (1 - HIGH_NOISE) * uniform
    return torch.where(torch.rand(count) < HIGH_NOISE_SHARE, high, shifted)


def training_loss(
    demo: DemoModel,
    latents: torch.Tensor,
    captions: list[str],
    scenes: list[clips.Scene | None],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss to descend, and its parts by name.

    "loss" is the mean squared error of the predicted velocity (noise - latents); the others are the
    cross-entropies of the word readers, which count READ_WEIGHT each.
    """
    sigma = draw_noise_levels(len(latents)).to(latents.device)
    noise = torch.randn_like(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    padded_length = int(rng.integers(64, model.MAX_PADDED_LENGTH + 1))
    velocity, features = demo((1 - level) * latents + level * noise, sigma, captions, padded_length)
    flow = (velocity.float() - (noise - latents)).square().mean()
    total, parts = flow, {"loss": float(flow.detach())}
    for index, reader, hidden in zip(READ_AFTER, demo.readers, features, strict=True):
        for name, value in reader(hidden, scenes).items():
            total = total + READ_WEIGHT * value
            parts[f"{name} after block {index} (nats)"] = float(value.detach())
    return total, parts


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def direction_gain(
    demo: DemoModel, bank: LatentBank, count: int, level: float = 0.93, batches: int = 4
) -> float:
    """How much worse, in percent of the loss, the model does when the caption names the opposite
    direction.

    Zero until the model reads the direction from the caption. Measured on clips of the bank, all at
    one noise level.
    """
    losses = {"told": 0.0, "opposite": 0.0}
    for _ in range(batches):
        picks = bank.rng.choice(len(bank.scenes), count, replace=False)
        latents = bank.latents[torch.from_numpy(picks).to(bank.latents.device)].float()
        noise = torch.randn_like(latents)
        sigma = torch.full((count,), level, device=latents.device)
        mix = sigma.view(count, 1, 1, 1, 1)
        for name in losses:
            scenes = [bank.scenes[i] for i in picks]
            if name == "opposite":
                scenes = [replace(scene, direction=OPPOSITE[scene.direction]) for scene in scenes]
            captions = [clips.TEMPLATES[0].format(**vars(scene)) for scene in scenes]
            prediction, _ = demo(
                (1 - mix) * latents + mix * noise, sigma, captions, model.MAX_PADDED_LENGTH
            )
            losses[name] += float((prediction.detach() - (noise - latents)).square().mean())
    return 100 * (losses["opposite"] / losses["told"] - 1)
