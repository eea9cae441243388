"""Makes the small random checkpoints of tests/data/pretrained and the answers that `transformers` gives with them.

    pip install torch transformers safetensors tokenizers    (an environment of its own)
    python tests/data/make_pretrained.py

Written with transformers 5 and torch 2.13, and committed: the tests need neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FOLDER = Path(__file__).parent / "pretrained"
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LONG = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "llama_scaled": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE, tie_word_embeddings=True, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LONG}
        ),
    ),
    "llama_linear": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        ),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=False)),
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "the cat sat on the mat",
    "it's 12 o'clock and the cat is back",
    "no, the mat is not the hat",
    "über naïve café",
]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXT * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def main() -> None:
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_((1.0 if key.endswith("norm.weight") else 0.0) + 0.3 * torch.randn_like(parameter))
        tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = model(tokens).logits
        model.save_pretrained(FOLDER / name, max_shard_size="20KB" if name == "qwen3" else "1GB")
        if name == "llama":
            made = tokenizer()
            made.save_pretrained(FOLDER / name)
            messages = [{"role": "user", "content": "is the cat back?"}]
            chat = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            (FOLDER / name / "chat.txt").write_text(chat)
        np.savez(FOLDER / name / "answers.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    main()
