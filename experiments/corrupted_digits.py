"""Test-time training and Tent on corrupted images: digits here, CIFAR-10-C for who has it.

Command                                                   hardware       time       expected
python -m experiments.corrupted_digits                    1 CPU core                figures on the embedded digits
python -m experiments.corrupted_digits --data-dir DATA \\
    --record                                              1 CPU core     35 min     see the ledger
python -m experiments.corrupted_digits --dataset cifar10 --data-dir CIFAR \\
    --corrupted-dir CIFAR-10-C --seeds 1 --record         1 GPU          not run    published: Sun et al. 2020

Published, on CIFAR-10-C with a ResNet-26 and group normalisation (error): online < standard < joint on noise, and joint
about as good as the baseline. On digits nothing is published; the question is whether that order holds.

The nets are CNNs of two convolutions (8 and 16 channels) and 32 hidden units, small because every test image costs a
training step of 32 views (online) or ten (standard). "baseline", "joint" and "ttt" share one with group normalisation;
the rotation head branches off after the first convolution, a second convolution and 32 hidden units of its own.
"source", "norm" and "tent" share one with batch normalisation. All learn with crops of 2 pixels and without flips, as a
mirrored 2 is no 2. Quarter turns are a fair task for digits, though not one that can be learnt perfectly: half a turn
leaves 0, 1 and 8 as they are, and makes a 6 a 9. A test image gets `views` crops, each turned at random; "ttt" takes ten
steps and forgets them, "ttt online" one step an image and keeps them within a condition; "tent" learns from batches of
100 within a condition, "norm" answers by their statistics alone, "source" by those of training.

Conditions are the 15 corruptions of CIFAR-10-C at 5 severities, 600 test images each, and two more kinds of noise.
Standard "ttt" is slow: it answers every third image of the 15 noise conditions (5 noises at severities 1, 3 and 5), and
so do all methods in the setting "noise, equal rows". Learning rates at test time are chosen on corrupted images that were
held out of training, by the first seed, among those in `PROTOCOLS`, the papers' first.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cl_zoo import (
    Batch,
    LabelledImages,
    Learner,
    Model,
    Stream,
    TrainState,
    cnn,
    compose,
    crop_and_flip,
    enable_compilation_cache,
    evaluate_adapting,
    resnet26,
    resnet_tail,
    supervised,
    tent,
    ttt,
    with_rotation_head,
)
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.streams.cifar import load_cifar10
from cl_zoo.streams.corrupted_images import conditions, corrupted_images
from cl_zoo.streams.corruptions import CORRUPTIONS, NOISES
from cl_zoo.training.run_directory import write_json
from experiments.common import RESULTS, load_images, record, settle_run, shown_command


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


_RATES = {"ttt": (1e-3, 1e-2, 5e-2), "ttt online": (1e-3, 1e-2), "tent": (1e-3, 1e-2)}
_DIGITS = Protocol(2, 128, 0.1, 2, False, (1, 2, 3, 4, 5), (1, 3, 5), 600, 3, 10, 32, 100, 5000,
                   {"ttt": 30, "ttt online": 200, "tent": 600}, _RATES)  # fmt: skip
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
NETS = {"baseline": "baseline", "source": "batch", "norm": "batch", "tent": "batch"}  # all else: "joint"
FAMILIES = {"noise": slice(0, 3), "blur": slice(3, 7), "weather": slice(7, 11), "digital": slice(11, 15)}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

# Error in percent on CIFAR-10-C at severity 5: baseline, joint, standard, online.
_SUN = """gaussian_noise 50.5 49.4 45.6 25.8; shot_noise 47.2 45.3 41.8 22.6; impulse_noise 56.1 53.4 50.0 30.6;
defocus_blur 23.7 24.2 21.8 14.6; glass_blur 51.7 48.5 46.1 34.4; motion_blur 24.3 24.8 23.0 18.3;
zoom_blur 26.3 26.4 23.9 17.1; snow 25.6 25.0 23.9 20.0; frost 34.4 32.5 30.0 18.0; fog 28.1 27.5 25.1 16.9;
brightness 13.5 12.6 12.2 11.2; contrast 25.0 25.3 23.9 15.6; elastic_transform 27.4 24.0 22.6 21.6;
pixelate 55.8 51.6 47.2 18.1; jpeg_compression 29.8 28.7 27.2 21.2"""
PUBLISHED = {
    (f"CIFAR-10-C, severity 5, {name}", method): [
        {"mean": float(error), "sem": None, "source": "Sun et al. 2020, arXiv 1909.13231, ResNet-26 with group norm"}
    ]
    for name, *errors in (line.split() for line in _SUN.split(";"))
    for method, error in zip(("baseline", "joint", "ttt", "ttt online"), errors, strict=True)
} | {
    ("CIFAR-10-C, severity 5, mean of 15", method): [
        {"mean": error, "sem": None, "source": "Wang et al. 2021, README of its code, WRN-28-10"}
    ]
    for method, error in (("source", 43.5), ("norm", 20.4), ("tent", 18.6))
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    dataset: Literal["mnist", "cifar10"] = "mnist"
    protocol: Literal["full", "smoke"] = "full"
    data_dir: str | None = None
    """Folder of the MNIST files (without it, the embedded digits), or of CIFAR-10's binary version."""
    corrupted_dir: str | None = None
    """Folder of CIFAR-10-C's files; without it, CIFAR-10 is corrupted here."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    seeds: int = 3
    methods: tuple[str, ...] = METHODS
    directory: str = "runs/corrupted_digits"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


class Grid(NamedTuple):
    """Attributes:
    stream: of one task for every condition.
    conditions: its (corruption, severity) pairs.
    """

    stream: Stream
    conditions: tuple[tuple[str, int], ...]


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    if unknown := set(config.methods) - set(METHODS):
        raise SystemExit(f"methods names {', '.join(sorted(unknown))}, but there are {', '.join(METHODS)}")
    enable_compilation_cache()
    protocol = PROTOCOLS["smoke" if config.protocol == "smoke" else config.dataset]
    directory = Path(config.directory)
    images = _images(config)
    settle_run(directory, {"dataset": config.dataset, "protocol": json.loads(json.dumps(protocol._asdict()))}, images)
    kept = len(images.train_labels) - protocol.held_out
    options = {"rows": protocol.rows, "data_dir": config.corrupted_dir, "images": images}
    grid = make_grid(CORRUPTIONS, protocol.severities, protocol.test_batch, **options)
    noises = [name for name in NOISES if config.corrupted_dir is None or name in CORRUPTIONS]
    more = [name for name in noises if name not in CORRUPTIONS]
    more_noise = make_grid(more, protocol.noise_severities, protocol.test_batch, **options) if more else None
    equal = make_grid(noises, protocol.noise_severities, protocol.test_batch, **options)
    equal = equal._replace(stream=thinned(equal.stream, protocol.every))

    folder = directory / "cells"
    rates: dict[str, float] = {}
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    with tqdm(total=config.seeds * len(config.methods), unit="run") as bar:
        for seed in range(config.seeds):
            train = _Nets(config, protocol, images, kept, seed)
            if seed == 0:
                rates = choose_rates(folder / "rates.json", protocol, images, kept, train, config.methods)
            for method in config.methods:
                bar.set_description(method)
                path = folder / f"{method}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    begun = time.perf_counter()
                    net, state = train(NETS.get(method, "joint"))
                    answers = answering(method, net, protocol, rates.get(method, 0.0))
                    errors = {
                        name: error_rows(answers, each, state, method, protocol).mean(1).tolist()
                        for name, each in (("grid", grid), ("more noise", more_noise), ("equal", equal))
                        if each is not None and (method != "ttt" or name == "equal")
                    }
                    if method != "ttt":  # online, all images of a condition come before its last
                        errors["equal"] = _equal_rows(answers, grid, more_noise, equal, state, method, protocol)
                    write_json(path, {"errors": errors, "seconds": time.perf_counter() - begun})
                found[method].append(json.loads(path.read_text()))
                bar.update()
    cells = summary(found, config)
    print(shown(cells, config.seeds))
    print(f"figure: {figure(found, grid, equal, directory)}")
