"""What diffusers' tests load from a hub, as small random things made here, of the same classes."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))


PLACES = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
"""Where images and videos stand in the text of Qwen2-VL: token -> its id in the configurations."""


def tokenizer(**more: int) -> PreTrainedTokenizerFast:
    """One token a letter, closed by </s>, padded with <pad>: 32 words wide at least."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{c: n + 3 for n, c in enumerate(LETTERS)}}
    made = Tokenizer(models.WordLevel({**vocabulary, **more}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(more),
    )


def t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0
    )


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5EncoderModel(t5_config()).eval()


def chat(**more: int) -> PreTrainedTokenizerFast:
    """Of a model that is talked to: the words of each message, one after the other."""
    made = tokenizer(**more)
    made.chat_template = (
        "{% for message in messages %}{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return made


def seeing() -> Any:
    """Of a model that is shown images, too."""
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=chat(**PLACES),
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )


def qwen() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 1103,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "type": "default"},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def gemma() -> Any:
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 1103,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def siglip() -> Any:
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=30,
        patch_size=2,
    )
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(config).eval()


def siglip_images() -> Any:
    return transformers.SiglipImageProcessor(size={"height": 30, "width": 30})


def clip() -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.model_max_length = 77
    return made


OFFLINE: dict[str, dict[str, Callable[[], Any]]] = {
    "hf-internal-testing/tiny-random-t5": {
        "AutoConfig": t5_config,
        "AutoTokenizer": tokenizer,
        "T5EncoderModel": t5,
        "T5Tokenizer": tokenizer,
        "T5TokenizerFast": tokenizer,
    },
    "hf-internal-testing/tiny-random-clip": {"CLIPTokenizer": clip},
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": {
        "AutoProcessor": seeing,
        "Qwen2Tokenizer": chat,
        "Qwen2VLForConditionalGeneration": qwen,
        "Qwen2VLProcessor": seeing,
    },
    "hf-internal-testing/Mistral-Small-3.1-24B-Instruct-2503-only-processor": {
        "AutoProcessor": chat
    },
    "hf-internal-testing/tiny-gemma3": {
        "AutoTokenizer": chat,
        "Gemma3ForConditionalGeneration": gemma,
    },
    "hf-internal-testing/tiny-random-SiglipVisionModel": {
        "SiglipImageProcessor": siglip_images,
        "SiglipVisionModel": siglip,
    },
    "finetrainers/dummy-hunyaunvideo": {"LlamaTokenizer": tokenizer},
}
"""Repository -> class whose `from_pretrained` is asked -> what it gives."""


@cache
def install() -> None:
    """Answer `from_pretrained` of the repositories above; everything else goes the usual way."""
    for name in sorted({name for makers in OFFLINE.values() for name in makers}):
        asked = getattr(transformers, name, None)
        if asked is not None:
            asked.from_pretrained = classmethod(answering(name, asked.from_pretrained.__func__))


def answering(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(usual)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        maker = OFFLINE.get(str(source), {}).get(name)
        return maker() if maker and cls.__name__ == name else usual(cls, source, *args, **kwargs)

    return from_pretrained
