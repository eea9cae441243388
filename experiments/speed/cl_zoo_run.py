"""EWC or DER++ on permuted MNIST with cl_zoo; prints one JSON line.

A fresh process tells the time from after its imports to its result: reading the data, building the stream, tracing,
compiling (or loading from the compilation cache given by --cache) and running. --repeats then runs the compiled program
again: the warm time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import optax

from cl_zoo import compose, der, ewc, supervised
from cl_zoo.compilation import enable_compilation_cache
from cl_zoo.datasets import LabelledImages
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist
from cl_zoo.training import stream_program

SETTINGS = {"permuted": (5, 10_000, (256, 256), 64), "online": (10, 2_000, (100, 100), 10)}


def main() -> None:
    """See above."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz with images and permutations")
    parser.add_argument("--setting", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--method", choices=["ewc", "der++"], default="ewc")
    parser.add_argument("--labels", choices=["expected", "observed"], default="observed")
    parser.add_argument("--cache", type=Path, help="of compiled programs")
    parser.add_argument("--repeats", type=int, default=0)
    args = parser.parse_args()
    if args.cache:
        enable_compilation_cache(args.cache)
    n_tasks, n_train, hidden, batch_size = SETTINGS[args.setting]
    with np.load(args.data, allow_pickle=False) as data:
        images = LabelledImages(*(data[field] for field in LabelledImages._fields))
        permutations = data["permutations"]
    if len(images.train_labels) != n_train or len(permutations) != n_tasks:
        raise SystemExit(f"{args.data} does not hold {n_train} training images and {n_tasks} permutations")
    stream = permuted_mnist(n_tasks, images=images, batch_size=batch_size)
    stream = dataclasses.replace(stream, data=stream.data._replace(permutations=jax.numpy.asarray(permutations)))
    learner = compose(
        mlp((28, 28), 10, hidden=hidden, initialiser="fan_in_uniform"),
        optax.adam(1e-3),
        supervised(),
        ewc(100.0, labels=args.labels)
        if args.method == "ewc"
        else der(500, alpha=0.5, beta=0.5, batch_size=batch_size),
        tasks=stream.tasks,
    )
    arguments = (learner, stream, jax.random.key(0))
    compiled = stream_program(learner, stream).lower(*arguments).compile()
    built = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    first = time.perf_counter()
    warm = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        warm.append(time.perf_counter() - start)
    report = {
        "peer": "cl_zoo",
        "setting": args.setting,
        "method": args.method,
        "labels": args.labels,
        "seconds_total_after_imports": first - begun,
        "seconds_build_and_compile": built - begun,
        "seconds_run": float(np.median(warm)) if warm else first - built,
        "seconds_warm": warm,
        "mean_accuracy": float(result.accuracy[-1].mean()),
        "versions": {"jax": jax.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
