"""A small decoder-only language model with a tokenizer of its own, as a Hugging Face folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.models.build import build
from softprompt_jax.models.causal_settings import CausalSettings, LayerKind, Rope
from softprompt_jax.models.settings import ModelSettings

TEXTS = (
    "a warm , funny and quietly moving film .",
    "two hours of my life that i will never get back .",
    "the jokes fall flat and the plot makes no sense .",
    "great terrible positive negative good bad sentence: review:",
)


@functools.cache
def _tokenizer() -> str:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 4, trainer)
    return made.to_str()


def settings(**changes) -> CausalSettings:
    """Return the settings of a Llama with grouped keys, 2 layers of width 32."""
    values = {
        "family": "llama",
        "vocabulary_rows": 416,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_heads": 4,
        "num_key_heads": 2,
        "num_layers": 2,
        "activation": "silu",
        "tied": True,
        "score_scale": 8**-0.5,
        "eos": 2,
        "kinds": (LayerKind(rope=Rope()),),
        "pattern": (0, 0),
    }
    return CausalSettings(**(values | changes))


CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def folder(path: Path, of: ModelSettings | None = None, chat: bool = False, **changes) -> Path:
    """Write a model with random weights and its tokenizer; `chat`: with a template for conversations."""
    save_backbone(build(of or settings(**changes), jax.random.key(0)), path, "float32")
    (path / "tokenizer.json").write_text(_tokenizer())
    pad = "<|endoftext|>" if of is not None and of.padding == 0 else "<|im_end|>"  # the id 0, or one that ends texts
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": pad}
    about |= {"chat_template": CHAT} if chat else {}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path
