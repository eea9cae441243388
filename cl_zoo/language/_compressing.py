"""A decoder as an encoder: the whole sequence from its last state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.language._decoder import Decoder, check_decoder
from cl_zoo.layers.mixer import linear, product
from cl_zoo.layers.norms import rms_norm
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["compressing"]


@checked
def compressing(decoder: Decoder) -> Model:
    """What a decoder's last state has kept of a sequence: every token is to be read from it and its place.

        c = h_L;   outputs_t = RMSNorm(gelu(RMSNorm(gelu(RMSNorm(c + p_t) W_1)) W_2)) W_3,     t = 1, ..., L

    with p_t sines and cosines of the place. The blocks are the decoder's, its output head is not used.

    Args:
      decoder: the network.

    Returns:
      A `Model` from `[B, L]` to `[B, L, V]`, with parameters "decoder", "first", "second", "output" and "norms".

    Source: Poli et al. 2024 (MAD), arXiv 2403.17844, its code's auto-encoder, of which W_1 to W_3 have biases.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import decoder
      >>> from cl_zoo.layers import softmax_attention
      >>> model = compressing(decoder(16, [(softmax_attention(8, 2), 16, 1)]))
      >>> tokens = jnp.zeros((2, 5), jnp.int32)
      >>> params, state = model.init(jax.random.key(0), tokens)
      >>> model.apply(params, state, tokens)[0].shape
      (2, 5, 16)
    """
    check_decoder("compressing", decoder)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, 4)
        inner, _ = decoder.model.init(keys[0], x)
        vocabulary, width = inner["embedding"].shape
        params = {
            "decoder": inner,
            "first": linear(keys[1], width, width),
            "second": linear(keys[2], width, width),
            "output": linear(keys[3], width, vocabulary),
            "norms": jnp.ones((3, width)),
        }
        return params, {}

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        code = decoder.hidden(params["decoder"], x)[:, -1]
        width = code.shape[-1]
        frequency = 10_000.0 ** (-jnp.arange(width // 2) / max(width // 2, 1))
        angle = jnp.arange(x.shape[1])[:, None] * frequency
        places = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(code.dtype)
        z = code[:, None] + jnp.pad(places, ((0, 0), (0, width - places.shape[-1])))
        for norm, layer in zip(params["norms"][:2], ("first", "second")):
            z = jax.nn.gelu(product(rms_norm(z, norm), params[layer]))
        return product(rms_norm(z, params["norms"][2]), params["output"]), model_state, {}

    return Model(init, apply)
