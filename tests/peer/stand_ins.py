"""What diffusers' tests load from a hub, as small random things made here, of the same classes."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-_()"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, closed by </s>, padded with <pad>: 32 words wide at least."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{c: n + 3 for n, c in enumerate(LETTERS)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0
    )


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5EncoderModel(t5_config()).eval()


def chat() -> PreTrainedTokenizerFast:
    """Of a model that is talked to: the words of each message, one after the other."""
    made = tokenizer()
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


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
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": {"Qwen2Tokenizer": chat},
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
