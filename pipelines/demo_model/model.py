"""The parts of the demo pipeline beside the autoencoder, and how training feeds them.

The stock `WanPipeline` pads a prompt's embedding with zeros to `max_sequence_length` and lets the
pads take part in cross-attention. All pads are the same key and value, so training keeps one pad
and adds ln(count) to its logit (`PaddedCrossAttention`): the same result as the stock forward at a
fraction of its cost.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import clips
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from session import forget_origin
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 64
FLOW_SHIFT = 5.0
MAX_PADDED_LENGTH = 512
CAPTION_LENGTH = 18  # tokens; a fixed length keeps compiled training from recompiling


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A closed vocabulary of lower-case words; every prompt ends in </s>, as with T5."""
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *clips.vocabulary()])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_PADDED_LENGTH,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 64, random weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_DIM,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def build_transformer(latent_channels: int) -> WanTransformer3DModel:
    """A Wan diffusion transformer, 6 layers of 2 heads of 64, one token per latent cell.

    Two starting points differ from the stock ones. The output starts at zero. Cross-attention
    starts able to see a
    short prompt among 500 pads: pads begin as zero keys and values, and queries and keys with twice
    the usual norm.
    """
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
        embedder = transformer.condition_embedder.text_embedder
        embedder.linear_1.bias.zero_()
        embedder.linear_2.bias.zero_()
        for block in transformer.blocks:
            block.attn2.to_k.bias.zero_()
            block.attn2.to_v.bias.zero_()
            block.attn2.norm_q.weight.fill_(2.0)
            block.attn2.norm_k.weight.fill_(2.0)
    return transformer


def build_scheduler() -> UniPCMultistepScheduler:
    """The sampler that the demo ships: UniPC on flow-matching sigmas."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )


def embed_captions(
    text_encoder: nn.Module, tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> torch.Tensor:
    """Caption embeddings [B, L + 1, 64], zero past each caption's end; the last position is a pad
    throughout.

    L is CAPTION_LENGTH. Equals the first L + 1 rows of what `WanPipeline.encode_prompt` returns.
    """
    tokens = tokenizer(
        captions, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt"
    )
    if tokens.input_ids.shape[1] != CAPTION_LENGTH:
        raise ValueError(
            f"a caption has {tokens.input_ids.shape[1]} tokens, CAPTION_LENGTH is {CAPTION_LENGTH}"
        )
    device = next(text_encoder.parameters()).device
    mask = tokens.attention_mask.to(device)
    hidden = text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
    return F.pad(hidden * mask[..., None], (0, 0, 0, 1))


class PaddedCrossAttention:
    """Cross-attention in which the last key stands for `pad_count` identical keys; for training
    only.

    softmax over n equal logits s has the weight n exp(s) = exp(s + ln n), so the bias ln n on one
    key is exact.
    """

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None

    def set_pad_count(self, key_count: int, pad_count: int, device: torch.device) -> None:
        """Prepare the logit bias [1, 1, 1, key_count] for `pad_count` >= 1 pads behind the last
        key.
        """
        bias = torch.zeros(1, 1, 1, key_count, device=device)
        bias[..., -1] = math.log(pad_count)
        self.bias = bias

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, S, dim], encoder_hidden_states [B, L + 1, dim]; returns [B, S, dim]."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = (
            attn.norm_k(attn.to_k(encoder_hidden_states))
            .unflatten(2, (attn.heads, -1))
            .transpose(1, 2)
        )
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + self.bias
        out = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class PairRotationAttention:
    """Self-attention of WanAttention with the rotary embedding as one fused expression; for
    training only.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, S, dim], rotary_emb two of [1, S, 1, head_dim]; returns [B, S, dim]."""
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

        def rotate(x: torch.Tensor) -> torch.Tensor:
            even, odd = x.unflatten(2, (attn.heads, -1)).unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
            return turned.flatten(3).type_as(x).transpose(1, 2)

        query = rotate(attn.norm_q(attn.to_q(hidden_states)))
        key = rotate(attn.norm_k(attn.to_k(hidden_states)))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def use_padded_cross_attention(transformer: WanTransformer3DModel) -> PaddedCrossAttention:
    """Install one shared training processor in every cross-attention of the transformer; returns
    it.
    """
    processor = PaddedCrossAttention()
    for block in transformer.blocks:
        block.attn2.set_processor(processor)
    return processor


def save_pipeline(
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    transformer: WanTransformer3DModel,
    directory: Path,
) -> None:
    """Write a WanPipeline directory; each file is replaced in one move, so a reader never sees
    half of one.
    """
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=build_scheduler(),
        transformer=transformer,
    )
    staging = directory.parent / (directory.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    forget_origin(staging)
    for source in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = directory / source.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    shutil.rmtree(staging)
