"""Complete diffusers pipelines, tiny, random, built offline in well under a second each.

    pipe, call = build("wan")       # call: the arguments of pipe(...)
    latents = run(pipe, call)       # its first output, on one thread, with the same seed every time

The token grid is 3 x 4 x 6 = 72 tokens, which blocks of 16 do not divide; two layers of two heads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

TEXT_WIDTH = 16
VOCABULARY = 128
STEPS = 4
GRID = (3, 4, 6)

SPARSE: dict[str, Any] = {
    "layout": {"name": "tile", "tile": [2, 2, 2]},
    "schedule": {"density": 0.4, "dense_steps": 1, "dense_layers": [], "min_tokens": 0},
    "kernel": {"block_q": 16, "block_k": 16, "impl": "reference"},
}
"""Sparse on such small grids; one dense step, no dense layer."""

DENSE: dict[str, Any] = {**SPARSE, "schedule": {"name": "constant", "density": 1.0}}


def build(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `BUILDERS` and the arguments of its call. options: of `transformer`."""
    diffusers.utils.logging.disable_progress_bar()
    pipe, call = BUILDERS[name](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def run(pipe: Any, call: dict[str, Any], **override: Any) -> torch.Tensor:
    """First output of the pipeline, latents unless asked otherwise."""
    settings = {"output_type": "latent", **call, **override}
    with one_thread():
        return pipe(**settings, generator=torch.Generator().manual_seed(0))[0]


def forward(model: Any, **override: Any) -> torch.Tensor:
    """Output of one forward of a bare transformer, without gradients, on one thread."""
    with one_thread(), torch.no_grad():
        return model(**{**forward_arguments(), **override})[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on more threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().eval()


def transformer(
    seed: int = 0, heads: int = 2, head_dim: int = 16, kind: Any = None, **options: Any
) -> Any:
    """A Wan transformer, or a relative of this kind: two layers unless options say otherwise.

    An option that is None stays away, for relatives that do not have it.
    """
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": 2,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 64,
        "rope_max_seq_len": 32,
        **options,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return seeded(lambda: (kind or diffusers.WanTransformer3DModel)(**settings), seed)


def forward_arguments(grid: tuple[int, int, int] = GRID, seed: int = 0) -> dict[str, Any]:
    """Arguments of the forward of a bare `transformer()`."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, TEXT_WIDTH, generator=generator),
        "return_dict": False,
    }


def tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", *["a", "monkey", "dances", "bad", "quality"]]
    ids = {word: i for i, word in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        model_max_length=32,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def text_encoder(family: str = "UMT5") -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 2,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        num_decoder_layers=1,
    )
    return seeded(lambda: getattr(transformers, f"{family}EncoderModel")(config))


def vae(wide: bool = False) -> Any:
    """wide: 48 channels and 16-fold spatial reduction, as in the Wan 2.2 TI2V model."""
    settings: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    if wide:
        settings |= {
            "z_dim": 48,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "scale_factor_spatial": 16,
        }
    return seeded(lambda: diffusers.AutoencoderKLWan(**settings))


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


def parts(scheduler: Any = None, wide: bool = False) -> dict[str, Any]:
    """All components of a Wan pipeline but the transformers."""
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": vae(wide),
        "scheduler": scheduler or euler(),
    }


def arguments(height: int = 64, width: int = 96, **more: Any) -> dict[str, Any]:
    return {
        "prompt": "a monkey dances",
        "negative_prompt": "bad quality",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": height,
        "width": width,
        "num_frames": 9,
        "max_sequence_length": 8,
        **more,
    }


def still(height: int, width: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def wan(**options: Any) -> tuple[Any, dict[str, Any]]:
    return diffusers.WanPipeline(transformer=transformer(**options), **parts()), arguments()


def wan22(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Two transformers: the second takes over below 0.875 of the noise."""
    pipe = diffusers.WanPipeline(
        transformer=transformer(**options),
        transformer_2=transformer(seed=1, **options),
        boundary_ratio=0.875,
        **parts(unipc()),
    )
    return pipe, arguments()


def wan_ti2v(**options: Any) -> tuple[Any, dict[str, Any]]:
    """The transformer gets a timestep per token, all equal."""
    model = transformer(in_channels=48, out_channels=48, **options)
    pipe = diffusers.WanPipeline(
        transformer=model, expand_timesteps=True, **parts(unipc(), wide=True)
    )
    return pipe, arguments(128, 192)


def wan_ti2v_image(**options: Any) -> tuple[Any, dict[str, Any]]:
    """As wan_ti2v, but the tokens of the first frame, the given image, carry timestep 0."""
    pipe = diffusers.WanImageToVideoPipeline(
        transformer=transformer(in_channels=48, out_channels=48, **options),
        expand_timesteps=True,
        image_encoder=None,
        image_processor=None,
        **parts(unipc(), wide=True),
    )
    return pipe, arguments(128, 192, image=still(128, 192))


def vision() -> dict[str, Any]:
    """Image encoder and processor of a pipeline."""
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=16,
        patch_size=4,
    )
    return {
        "image_encoder": seeded(lambda: transformers.CLIPVisionModelWithProjection(config)),
        "image_processor": transformers.CLIPImageProcessor(size=16, crop_size=16),
    }


def wan_i2v(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Image keys in cross-attention; the stock processor takes the last 512 tokens for text."""
    pipe = diffusers.WanImageToVideoPipeline(
        transformer=transformer(in_channels=36, image_dim=8, added_kv_proj_dim=32, **options),
        **vision(),
        **parts(),
    )
    return pipe, arguments(image=still(64, 96), max_sequence_length=512)


def wan_v2v(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Strength 0.5: half of the steps are executed. Never enters `cache_context`."""
    pipe = diffusers.WanVideoToVideoPipeline(transformer=transformer(**options), **parts(unipc()))
    call = arguments(video=[still(64, 96)] * 9, strength=0.5)
    del call["num_frames"]
    return pipe, call


def latte() -> tuple[Any, dict[str, Any]]:
    """A video pipeline that vidsparse does not support; good for that error only."""
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
    )
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    return diffusers.LattePipeline(**nothing, transformer=model, scheduler=euler()), arguments()


BUILDERS: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    builder.__name__: builder
    for builder in (wan, wan22, wan_ti2v, wan_ti2v_image, wan_i2v, wan_v2v, latte)
}
WAN = tuple(name for name in BUILDERS if name.startswith("wan"))
