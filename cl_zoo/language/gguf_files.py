"""Decoders in GGUF files: the settings, the weights (dequantised) and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_zoo.language._extra import optional
from cl_zoo.language._gguf_header import check_gguf_header
from cl_zoo.language.tokenization import TextTokenizer, from_bpe

__all__ = ["GgufFile", "Tensors", "read_gguf"]

FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's names -> GGUF's, of whole tensors and of parts of blocks."""


class Tensors(NamedTuple):
    """Those of a checkpoint, under Hugging Face's names and in its order of rotary pairs.

    Attributes:
      names: all there are.
      shape: `(name) -> shape`, without reading it.
      read: `(name) -> array`.
    """

    names: frozenset[str]
    shape: Callable[[str], tuple[int, ...]]
    read: Callable[[str], np.ndarray]


class GgufFile(NamedTuple):
    """Attributes:
    settings: as a Hugging Face config.json would have them.
    tensors: read when they are asked for, float32.
    tokenizer: `() -> TextTokenizer`, or None where the file has none.
    """

    settings: dict[str, Any]
    tensors: Tensors
    tokenizer: Callable[[], TextTokenizer | None]


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    kind, *rest = reversed(name.split("."))
    part = ".".join(reversed(rest[:-3]))
    return f"blk.{rest[-3]}.{_NAMES[part]}.{kind}" if part in _NAMES else name


def _hugging_face_name(name: str) -> str:
    """The way back; names that are not known stay as they are."""
    back = {value: key for key, value in _NAMES.items()}
    if name in back:
        return back[name]
    kind, _, rest = name.partition(".")
    block, _, rest = rest.partition(".")
    part, _, leaf = rest.partition(".")
    return f"model.layers.{block}.{back[part]}.{leaf}" if kind == "blk" and part in back else name


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a file; tensors are read when they are asked for.

    Raises:
      ValueError: not a GGUF file, one that is cut off or states false lengths, or an unknown architecture.
    """
    gguf = optional("gguf")
    path = Path(path)
    check_gguf_header(path, gguf.GGML_QUANT_SIZES)
    try:
        with np.errstate(over="ignore"):  # of offsets that a false header adds up
            reader = gguf.GGUFReader(str(path))
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {each.name: each for each in reader.tensors}
    except Exception as error:  # whatever a broken header leads to
        raise ValueError(f"{path} is not a complete GGUF file: {type(error).__name__}: {error}") from error
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"{path}: the architecture is {family!r}, but only {', '.join(FAMILIES)} are supported")

    def told(name: str, otherwise: Any = None) -> Any:
        value = fields.get(f"{family}.{name}", otherwise)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 2**53:
            raise ValueError(f"{path}: {family}.{name} is {value!r}, but it must be a number")
        return value

    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: rope_freqs.weight (frequencies for long sequences) is not supported in GGUF files")
    heads = told("attention.head_count")
    table = tensors.get("token_embd.weight")
    settings = {
        "model_type": family,
        "vocab_size": int(table.shape[1]) if table is not None and len(table.shape) == 2 else 0,
        "hidden_size": told("embedding_length"),
        "intermediate_size": told("feed_forward_length"),
        "num_hidden_layers": told("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": told("attention.head_count_kv", heads),
        "head_dim": told("attention.key_length", told("embedding_length") // max(heads, 1)),
        "rms_norm_eps": told("attention.layer_norm_rms_epsilon"),
        "rope_theta": told("rope.freq_base", 10_000.0),
        "max_position_embeddings": told("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
    }
    scaling = fields.get(f"{family}.rope.scaling.type")
    if scaling not in (None, "none"):
        settings["rope_scaling"] = {"rope_type": scaling, "factor": told("rope.scaling.factor")}

    def named(name: str) -> Any:
        if (own := _gguf_name(name)) not in tensors:
            raise ValueError(f"{path}: there is no tensor {own!r}")
        return tensors[own]

    def shape(name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in named(name).shape[::-1])

    def read(name: str) -> np.ndarray:
        found = named(name)
        try:
            values = np.array(gguf.quants.dequantize(found.data, found.tensor_type), np.float32)
        except Exception as error:
            raise ValueError(f"{path}: {found.name} cannot be read as {found.tensor_type.name}: {error}") from error
        projection = name.rsplit(".", 2)[-2]
        if family == "llama" and projection in ("q_proj", "k_proj"):
            # These files pair neighbours in rotary positions; here the halves of a head are paired.
            n = heads if projection == "q_proj" else settings["num_key_value_heads"]
            values = np.swapaxes(values.reshape((n, -1, 2, *values.shape[1:])), 1, 2).reshape(values.shape)
        return values

    def listed(name: str, kind: type) -> list[Any]:
        found = fields.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list) or not all(isinstance(each, kind) for each in found):
            raise ValueError(f"{path}: tokenizer.ggml.{name} must be a list, each a {kind.__name__}")
        return found

    def tokenizer() -> TextTokenizer | None:
        kind = fields.get("tokenizer.ggml.model")
        if kind is None:
            return None
        if kind != "gpt2":
            raise ValueError(f"{path}: the tokenizer is {kind!r}, but only byte-level BPE ('gpt2') is read from GGUF")
        tokens, merges = listed("tokens", str), listed("merges", str)
        types = listed("token_type", int) if "tokenizer.ggml.token_type" in fields else []
        numbers = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        for name, i in numbers.items():
            if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
                raise ValueError(f"{path}: the {name} token is {i!r}, but there are tokens 0 to {len(tokens) - 1}")
        named = {f"{name}_token": tokens[i] for name, i in numbers.items() if i is not None}
        words, template = fields.get("tokenizer.ggml.pre", "default"), fields.get("tokenizer.chat_template")
        for name, value in (("tokenizer.ggml.pre", words), ("tokenizer.chat_template", template)):
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{path}: {name} is a {type(value).__name__}, but it must be a text")
        return from_bpe(
            tokens,
            merges,
            [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL],
            [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.USER_DEFINED],
            {"default": "gpt-2"}.get(words, words),
            stop=() if numbers["eos"] is None else (int(numbers["eos"]),),
            template=template,
            names=named,
        )

    names = frozenset(_hugging_face_name(name) for name in tensors)
    return GgufFile(settings, Tensors(names, shape, read), tokenizer)
