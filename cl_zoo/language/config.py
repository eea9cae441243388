"""The shape of a published decoder, and the config.json that describes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.language._decoder import Decoder, decoder
from cl_zoo.layers._rotary import RotaryScaling
from cl_zoo.layers.attention import softmax_attention

__all__ = ["DecoderConfig", "config_of", "settings_of"]

FAMILIES = ("llama", "qwen2", "qwen3")
LARGEST = 1 << 24  # of any one size in a config: a false one must not cause endless loops


class DecoderConfig(NamedTuple):
    """The shape of a published decoder.

    Attributes:
      family: "llama" (SmolLM2 is one), "qwen2" (2.5 too) or "qwen3".
      vocabulary, width, hidden, layers: V, D, the width of SwiGLU networks, blocks.
      heads, kv_heads, head_size: H, G and d.
      tied: whether the embedding also gives the logits.
      theta, scaling: of the rotary positions.
      epsilon: of all RMSNorms.
      biases: projections of attention that have one.
      context: length of the sequences that it was trained for, in tokens.
    """

    family: str
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    theta: float
    scaling: RotaryScaling | None
    epsilon: float
    biases: tuple[str, ...]
    context: int

    def decoder(self, *, rematerialise: bool = False, dtype: Any = jnp.float32) -> Decoder:
        """The network; see `cl_zoo.decoder` for the arguments."""
        mixer = softmax_attention(
            self.width,
            self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            biases=self.biases,
            qk_norm=self.family == "qwen3",
            theta=self.theta,
            scaling=self.scaling,
            epsilon=self.epsilon,
        )
        return decoder(
            self.vocabulary,
            [(mixer, self.hidden, self.layers)],
            tied=self.tied,
            rematerialise=rematerialise,
            epsilon=self.epsilon,
            dtype=dtype,
        )


@checked
def config_of(settings: dict[str, Any]) -> DecoderConfig:
    """The shape that a Hugging Face config.json describes.

    Raises:
      ValueError: one line on what is missing, out of range or not supported.
    """

    def refuse(field: str, allowed: str) -> ValueError:
        return ValueError(f"config: {field} is {settings.get(field)!r}, but only {allowed} is supported")

    def whole(field: str, otherwise: int | None = None) -> int:
        value = settings.get(field)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise ValueError(f"config: {field} is {value!r}, but it must be a whole number from 1 to {LARGEST}")
        return value

    def number(field: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"config: {field} is {value!r}, but it must be a number above 0")
        return float(value)

    family = settings.get("model_type")
    if family not in FAMILIES:
        raise refuse("model_type", ", ".join(FAMILIES))
    if settings.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "'silu'")
    for field in ("mlp_bias", "use_sliding_window", "quantization_config"):
        if settings.get(field):
            raise refuse(field, "none")
    kinds = settings.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise refuse("layer_types", "a list of 'full_attention'")
    width, heads = whole("hidden_size"), whole("num_attention_heads")
    if settings.get("head_dim") is None and family != "qwen3" and width % heads:
        raise ValueError(f"config: hidden_size is {width}, but it must be a multiple of num_attention_heads, {heads}")
    kv_heads = whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config: num_key_value_heads is {kv_heads}, but it must divide num_attention_heads, {heads}")
    rope: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        told = settings.get(field)
        if not isinstance(told, dict | None):
            raise refuse(field, "an object")
        rope |= told or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling(number("rope factor", rope.get("factor")))
    elif kind == "llama3":
        scaling = RotaryScaling(
            number("rope factor", rope.get("factor")),
            int(number("rope original_max_position_embeddings", rope.get("original_max_position_embeddings"))),
            number("rope low_freq_factor", rope.get("low_freq_factor")),
            number("rope high_freq_factor", rope.get("high_freq_factor")),
        )
    elif kind != "default":
        raise ValueError(f"config: rope_type is {kind!r}, but only default, linear and llama3 are supported")
    biases: tuple[str, ...] = ()
    if family == "qwen2":
        biases = ("query", "key", "value")
    elif settings.get("attention_bias"):
        biases = ("query", "key", "value", "output")
    return DecoderConfig(
        family=family,
        vocabulary=whole("vocab_size"),
        width=width,
        hidden=whole("intermediate_size"),
        layers=whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=whole("head_dim", 128 if family == "qwen3" else width // heads),
        tied=bool(settings.get("tie_word_embeddings", False)),
        theta=number("rope_theta", rope.get("rope_theta", settings.get("rope_theta", 10_000.0))),
        scaling=scaling,
        epsilon=number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        biases=biases,
        context=whole("max_position_embeddings", 2048),
    )


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a shape: `config_of(settings_of(config)) == config`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    if config.scaling is not None and config.scaling.original_length is None:
        rope |= {"rope_type": "linear", "factor": config.scaling.factor}
    elif config.scaling is not None:
        names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        rope |= {"rope_type": "llama3"} | dict(zip(names, config.scaling))
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [architecture[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.theta,
        "rope_scaling": None if config.scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": "output" in config.biases or config.family == "qwen2",
        "max_position_embeddings": config.context,
        "torch_dtype": "float32",
    }
