"""A second head, which predicts the rotation of an image (0, 90, 180 or 270 degrees)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.types import Array, Key, Model, PyTree, Taps

__all__ = ["with_rotation_head"]

Group = tuple[tuple[tuple[str, ...], int, str], ...]


@checked
def with_rotation_head(model: Model, head: Model, reads: str) -> Model:
    """Two branches on one trunk: the outputs are the model's, and `head` predicts the rotation.

        z = trunk(x);   outputs = main(z);   rotation logits = head(z)

    The trunk is what comes before the layer named `reads`, whose input is z. That layer and those after it get no
    gradient from the head. Where the head's taps are not used, it is not computed.

    Args:
      model: with taps.
      head: computes 4 outputs from z; its last tap is its output. Its first layer is the one that makes its first
        group of units, or `output` where it has none.
      reads: a name in the model's taps.

    Returns:
      A `Model` with parameters `{"params": those of the model, "rotation_head": those of head}`; model_state, taps and
      units are named likewise. The head's taps stand before the model's last, so that first and last are the model's.

    Raises:
      ValueError: at `init`, a name that is not a tap, a head without taps or with another number of outputs.

    Source: Sun et al. 2020, "Test-time training with self-supervision for generalization under distribution shifts",
    arXiv 1909.13231.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.models import mlp
      >>> model = with_rotation_head(mlp((4, 4), 10, hidden=(8,)), mlp((8,), 4, hidden=()), reads="output")
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 4, 4)))
      >>> params["rotation_head"]["output"]["kernel"].shape
      (8, 4)
    """

    inner = model.bind(None)

    def read(taps: Taps) -> Array:
        if reads not in taps:
            raise ValueError(
                f"with_rotation_head: reads is {reads!r}, but the model has taps of {', '.join(taps) or 'no layer'}"
            )
        return taps[reads][0]

    def init(key: Key, x: PyTree, weights: PyTree = None) -> tuple[PyTree, PyTree]:
        bound = inner.bind(weights)
        params, model_state = bound.init(key, x)
        z = jax.eval_shape(lambda p, s, x: read(bound.apply(p, s, x)[2]), params, model_state, x)
        zeros = jnp.zeros(z.shape, z.dtype)
        head_params, head_state = head.init(jax.random.fold_in(key, 1), zeros)
        outputs, _, taps = jax.eval_shape(head.apply, head_params, head_state, zeros)
        if not taps or outputs.shape[-1] != 4:
            raise ValueError(
                f"with_rotation_head: the head has {outputs.shape[-1]} outputs and taps of"
                f" {', '.join(taps) or 'no layer'}, but it must have 4, for four rotations, and a tap of its last layer"
            )
        return {"params": params, "rotation_head": head_params}, {"params": model_state, "rotation_head": head_state}

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: PyTree,
        *,
        task: Array | None = None,
        perturb: dict[str, Array] | None = None,
        weights: PyTree = None,
        **options: Any,
    ) -> tuple[PyTree, PyTree, Taps]:
        def part(name: str) -> dict[str, Array] | None:
            if perturb is None:
                return None
            return {key.removeprefix(f"{name}/"): value for key, value in perturb.items() if key.startswith(f"{name}/")}

        outputs, state, taps = inner.bind(weights).apply(
            params["params"], model_state["params"], x, task=task, perturb=part("params"), **options
        )
        _, head_state, head_taps = head.apply(
            params["rotation_head"],
            model_state["rotation_head"],
            read(taps),
            perturb=part("rotation_head"),
            **options,
        )
        *before, last = ((f"params/{name}", tap) for name, tap in taps.items())
        beside = [(f"rotation_head/{name}", tap) for name, tap in head_taps.items()]
        return outputs, {"params": state, "rotation_head": head_state}, dict([*before, *beside, last])

    first = head.units[0][0][0][:-1] if head.units else ("output",)
    # Units that the layer `reads` reads are read by the head too.
    at, beside = ((*reads.split("/"), "kernel"), "in"), (("rotation_head", *first, "kernel"), -2, "in")
    trunk = (
        _under("params", group) + ((beside,) if at in [(path, role) for path, _, role in group] else ())
        for group in model.units
    )
    return dataclasses.replace(
        model,
        init_function=init,
        apply_function=apply,
        units=(*trunk, *(_under("rotation_head", group) for group in head.units)),
        inner_function=lambda params, weights=None: inner.bind(weights).inner_params(params["params"]),
        takes_weights=True,
    )


def _under(name: str, group: Group) -> Group:
    return tuple(((name, *path), axis, role) for path, axis, role in group)
