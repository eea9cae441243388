"""The nets of `experiments.corrupted_digits`: what is learned before the tests, and what answers in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo import Batch, Learner, Model, Stream, TaskInfo, TrainState, compose, run_stream, supervised, tent, ttt
from cl_zoo.algorithms.ttt import crop_and_flip
from cl_zoo.datasets import LabelledImages
from cl_zoo.models import cnn, resnet26, resnet_tail
from cl_zoo.streams import scenario_tasks
from cl_zoo.types import Array, Key
from cl_zoo.wrappers import with_rotation_head


class Protocol(NamedTuple):
    """What is run.

    Attributes:
      epochs, batch, learning_rate: of training: SGD with momentum 0.9 and weight decay 5e-4, the rate divided by ten
        after 1/2 and 5/6 of it, as theirs after 75 and 125 of 150 epochs.
      pad, flip: of the crops.
      severities, noise_severities: of the 15 corruptions, and of the noises on which all methods are compared.
      rows, every: test images of a condition; of these standard TTT answers one in `every`.
      steps, views: of standard TTT.
      test_batch: of Tent.
      held_out, search_rows: training images kept for choosing rates; of these a condition has `search_rows`.
      rates: that are tried, by method.
    """

    epochs: int
    batch: int
    learning_rate: float
    pad: int
    flip: bool
    severities: tuple[int, ...]
    noise_severities: tuple[int, ...]
    rows: int
    every: int
    steps: int
    views: int
    test_batch: int
    held_out: int
    search_rows: dict[str, int]
    rates: dict[str, tuple[float, ...]]


_RATES = {"ttt": (1e-3, 1e-2, 5e-2), "ttt online": (1e-3, 1e-2, 3e-2), "tent": (1e-3, 1e-2)}
_DIGITS = Protocol(2, 128, 0.1, 2, False, (1, 2, 3, 4, 5), (1, 3, 5), 1000, 5, 10, 32, 100, 5000,
                   {"ttt": 30, "ttt online": 200, "tent": 1000}, _RATES)  # fmt: skip
PROTOCOLS = {
    "mnist": _DIGITS,
    # The official settings; its authors publish the rate too, so nothing is searched.
    "cifar10": Protocol(150, 128, 0.1, 4, True, (5,), (5,), 10000, 1, 10, 32, 200, 0, {},
                        {"ttt": (1e-3,), "ttt online": (1e-3,), "tent": (1e-3,)}),
    "smoke": _DIGITS._replace(epochs=1, batch=50, severities=(5,), noise_severities=(5,), rows=20, every=10, steps=2,
                              views=4, test_batch=10, held_out=9800, search_rows=dict.fromkeys(_RATES, 10),
                              rates=_RATES | {"ttt": (1e-3,), "ttt online": (1e-3,)}),
}  # fmt: skip
METHODS = ("baseline", "joint", "ttt", "ttt online", "source", "norm", "tent")
# Which net answers in a method; nets are called as methods are that only answer.
NETS = dict.fromkeys(("joint", "ttt", "ttt online"), "joint") | dict.fromkeys(("source", "norm", "tent"), "batch") | {
    net: net for net in ("baseline", "batch")
}  # fmt: skip


def model(dataset: str, kind: str) -> Model:
    """The network of a kind: "baseline" and "batch" have one head, "joint" has two."""
    norm = "batch" if kind == "batch" else "group"
    if dataset == "cifar10":
        scaled = lambda x: x.astype(jnp.float32) / 127.5 - 1  # noqa: E731
        net, tail = resnet26((32, 32, 3), 10, norm=norm, preprocess=scaled), resnet_tail(4, norm=norm)
        return with_rotation_head(net, tail, "group_3") if kind == "joint" else net
    options: dict[str, Any] = {"hidden": 32, "norm": norm, "groups": 2}
    net, head = cnn((28, 28), 10, channels=(8, 16), **options), cnn((14, 14, 8), 4, channels=(16,), **options)
    return with_rotation_head(net, head, "conv_1") if kind == "joint" else net


def learner(
    dataset: str, protocol: Protocol, method: str, tasks: TaskInfo | None, rate: float = 0.0, size: int = 1
) -> Learner:
    """What learns, or what answers: the components of a method in testing, of its net ("joint", ...) in training."""
    kind = NETS[method]
    steps = protocol.epochs * (size // protocol.batch)  # of training; the rate's schedule is not used in testing
    schedule = optax.piecewise_constant_schedule(protocol.learning_rate, {steps // 2: 0.1, 5 * steps // 6: 0.1})
    optimiser = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))
    components = [supervised()]
    if kind == "joint":
        augment = crop_and_flip(protocol.pad, protocol.flip)
        n = {"ttt": protocol.steps, "ttt online": 1}.get(method, 0)
        components.append(ttt(rate, steps=n, views=protocol.views, augment=augment))
    if method in ("batch", "norm", "tent"):
        components.append(tent(rate))
    return compose(model(dataset, kind), optimiser, *components, tasks=tasks)


def trained(dataset: str, protocol: Protocol, images: LabelledImages, seed: int, kind: str) -> TrainState:
    """A net after training on all images but the last ones, which are held out."""
    kept = len(images.train_labels) - protocol.held_out
    teacher = learner(dataset, protocol, kind, None, size=kept)
    stream = cropped(protocol, images, kept, jax.random.split(jax.random.key(seed), protocol.epochs + 1)[1:])
    return run_stream(teacher, stream, jax.random.key(seed), measure={}, metrics=()).state


def cropped(protocol: Protocol, images: LabelledImages, kept: int, keys: Key) -> Stream:
    """The first images in random order, cropped anew each time; each epoch by a key of its own."""
    augment = crop_and_flip(protocol.pad, protocol.flip)
    per_epoch = kept // protocol.batch

    def init(key: Key) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros(kept, jnp.int32)

    def next_batch(data: Any, cursor: tuple[Array, Array], agent: Any) -> tuple[Batch, tuple[Array, Array]]:
        x, y, keys = data
        step, order = cursor
        key, place = keys[step // per_epoch], step % per_epoch
        order = jax.lax.cond(place == 0, lambda: jax.random.permutation(key, kept), lambda: order)
        index = jax.lax.dynamic_slice_in_dim(order, place * protocol.batch, protocol.batch)
        crops = augment(x[index], jax.random.fold_in(key, step))
        return Batch(crops, y[index], None, jnp.ones(protocol.batch)), (step + 1, order)

    return Stream(
        n_tasks=1,
        steps=protocol.epochs * per_epoch,
        provides=frozenset({"open_outputs"}),
        init_function=init,
        next_function=next_batch,
        tasks=scenario_tasks("domain", 1, 10),
        data=(
            jnp.asarray(images.train_images[:kept]),
            jnp.asarray(images.train_labels[:kept], jnp.int32),
            keys,
        ),
    )
