"""Loss of plasticity: does a net that has learnt many tasks still learn a new one as well as the first?

Command                                                   hardware       time      expected
python -m experiments.plasticity --record                 2 CPU cores    16 min   permuted MNIST, last 20 tasks:
                                                                                  naive 78, continual backprop 85,
                                                                                  shrink and perturb 81
python -m experiments.plasticity --data-dir DATA          2 CPU cores             figures on 10 000 images of all MNIST

Two problems of Dohare et al. 2024 (doi 10.1038/s41586-024-07711-7), in small. They publish curves, and no tables.

Online permuted MNIST: each task is a new order of the pixels and one pass over its images; what counts is the accuracy
on each batch before it is learnt. Theirs: 800 tasks of 60 000 images, 3 layers of 2000 units (a run with 100, too),
Kaiming's initialisation, single images, SGD 0.003. Here: 200 tasks of 10 000 images, 3 layers of 100 units, batches of
16. A batch of b rows makes b times fewer steps, so rates per image are kept: learning rate and replacement rate are
multiplied by b, the noise by sqrt(b). Maturity stays 100 steps.

Slowly-changing regression: a net with 5 hidden units follows a target whose inputs change one bit every 10 000 rows.
Theirs: 100 runs, binned by 20 000 rows. Here: 32 runs in one program, binned by task.

The utility of continual backprop is the "released" one, as in the authors' configurations of both.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cl_zoo import (
    Component,
    Learner,
    Model,
    Stream,
    compose,
    continual_backprop,
    enable_compilation_cache,
    redo,
    shrink_and_perturb,
    supervised,
)
from cl_zoo.compilation import jit
from cl_zoo.datasets import LabelledImages
from cl_zoo.estimators.units import unit_activations
from cl_zoo.evaluation import online_score
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.evaluation.plots import course
from cl_zoo.evaluation.probes import dormant_share, effective_rank, mean_absolute_weight
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist, slowly_changing_regression
from cl_zoo.training.loop import begin, finish, start, stream_functions, train_steps
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.common import RESULTS, load_images, record, settle_run, shown_command

Method = Literal["none", "continual backprop", "shrink and perturb", "redo"]


@dataclasses.dataclass(frozen=True)
class Permuted:
    """Online permuted MNIST. Rates are per image, see above."""

    tasks: int = 200
    images: int = 10_000
    """Of each task, the same ones with other permutations."""
    hidden: tuple[int, ...] = (100, 100, 100)
    batch_size: int = 16
    learning_rate: float = 0.003
    replacement_rate: float = 1e-5
    weight_decay: float = 1e-4
    noise: float = 1e-5
    threshold: float = 0.1
    """Of ReDo, which looks once a task."""
    probe_every: int = 10
    """Tasks between looks at the hidden units, on 1000 test images; singular values cost more than a task."""
    seeds: int = 3
    methods: tuple[Method, ...] = ("none", "continual backprop", "shrink and perturb")


@dataclasses.dataclass(frozen=True)
class Regression:
    """Slowly-changing regression, row by row."""

    tasks: int = 100
    steps: int = 10_000
    flip: Literal["one", "all"] = "one"
    hidden: int = 5
    learning_rate: float = 0.01
    replacement_rate: float = 1e-4
    runs: int = 32
    methods: tuple[Literal["none", "continual backprop", "shrink and perturb"], ...] = ("none", "continual backprop")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    study: Literal["both", "permuted_mnist", "regression"] = "both"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    permuted: Permuted = Permuted()
    regression: Regression = Regression()
    directory: str = "runs/plasticity"
    """Of the run; finished parts of an interrupted run there are not run again."""
    record: bool = False
    """Write the result files that the ledger is made from."""


def course_of(
    learner: Learner, stream: Stream, probe: Callable[[Any, Any, Any], dict[str, Any]], metric: str
) -> Callable[..., dict[str, Any]]:
    """`(tasks, data, key) -> {name: f32[T]}`: a scan over tasks drawn from the key; of each the mean of a metric over
    its updates, and what `probe` finds at its end. No evaluation matrix, which would be tasks x tasks."""
    functions = stream_functions(stream)

    def run(tasks: Any, data: Any, key: Any) -> dict[str, Any]:
        data = stream.reorder(data, jax.random.fold_in(key, 3))

        def one_task(carry: Any, t: Any) -> Any:
            state, cursor = carry
            state = begin(learner, functions, tasks, data, key, state, t)
            (state, cursor), metrics = train_steps(learner, functions, data, (state, cursor), stream.steps)
            state = finish(learner, functions, data, key, state, t)
            return (state, cursor), {"online": jnp.mean(metrics[metric]), **probe(state, data, t)}

        carry = start(learner, functions, data, key)
        return jax.lax.scan(one_task, carry, jnp.arange(stream.n_tasks, dtype=jnp.int32))[1]

    return run


def kept(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a finished part found; or it is run, timed and written."""
    if not path.exists():
        begun = time.perf_counter()
        found = {name: np.asarray(values) for name, values in run().items()}
        lost = [name for name, values in found.items() if not np.isfinite(values).all()]
        if lost:
            raise SystemExit(f"{path.stem}: {', '.join(lost)} is not finite; lower the learning rate")
        seconds = time.perf_counter() - begun
        write_json(path, {"seconds": seconds, **{name: values.tolist() for name, values in found.items()}})
    return json.loads(path.read_text())


def study_permuted(config: Permuted, images: LabelledImages, directory: Path) -> dict[str, dict[str, Any]]:
    """`{method: {"online": [S, T], "dormant", "rank", "weight": [S, looks], "seconds": [S]}}`."""
    every = max(len(images.train_labels) // config.images, 1)
    images = images._replace(
        train_images=images.train_images[::every][: config.images],
        train_labels=images.train_labels[::every][: config.images],
    )
    stream = permuted_mnist(config.tasks, images=images, batch_size=config.batch_size)
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden)
    b, rate = config.batch_size, config.learning_rate * config.batch_size
    looked = (config.tasks - 1) % config.probe_every  # so that the last task is among them
    components: dict[str, list[Component]] = {
        "none": [],
        "continual backprop": [continual_backprop(min(config.replacement_rate * b, 1.0), utility="released")],
        "shrink and perturb": [shrink_and_perturb(rate * config.weight_decay, config.noise * math.sqrt(b))],
        "redo": [redo(config.threshold, stream.steps)],
    }

    def probe(state: Any, data: Any, t: Any) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            rows = jax.tree.map(lambda leaf: leaf[0], stream.evaluation(data, t, "test"))
            taps = model.apply(state.params, state.model_state, rows.x)[2]
            hidden = unit_activations("probe", model.units, state.params, taps)
            return {
                "dormant": jnp.mean(jnp.stack([dormant_share(h, rows.weight, threshold=0.01) for h in hidden])),
                "rank": effective_rank(hidden[-1][:, 0], rows.weight),
                "weight": mean_absolute_weight(state.params),
            }

        # Zeros between looks are dropped below.
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(look))
        return jax.lax.cond(t % config.probe_every == looked, look, lambda: nothing)

    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(config.methods) * config.seeds, unit="run") as bar:
        for method in config.methods:
            bar.set_description(method)
            learner = compose(model, optax.sgd(rate), supervised(), *components[method], online_score(stream.score))
            program = jit(course_of(learner, stream, probe, "online_score/score"))
            parts = []
            for seed in range(config.seeds):
                run = functools.partial(program, stream.tasks, stream.data, jax.random.key(seed))
                parts.append(kept(directory / f"{method}-{seed}.json".replace(" ", "_"), run))
                bar.update()
            found[method] = {name: np.array([part[name] for part in parts]) for name in parts[0]}
            for name in ("dormant", "rank", "weight"):
                found[method][name] = found[method][name][:, looked :: config.probe_every]
    return found


def study_regression(config: Regression, directory: Path) -> dict[str, dict[str, Any]]:
    """`{method: {"online", "weight": [S, T], "seconds": [S]}}`; all runs of a method are one vmapped program."""
    stream = slowly_changing_regression(config.tasks, steps=config.steps, flip=config.flip)
    model: Model = mlp((20,), 1, hidden=(config.hidden,))
    components: dict[str, list[Component]] = {
        "none": [],
        "continual backprop": [continual_backprop(config.replacement_rate, utility="released")],
        "shrink and perturb": [shrink_and_perturb(config.learning_rate * 1e-4, 1e-5)],
    }

    def probe(state: Any, data: Any, t: Any) -> dict[str, Any]:
        return {"weight": mean_absolute_weight(state.params)}

    found: dict[str, dict[str, Any]] = {}
    for method in tqdm(config.methods, unit="method"):
        learner = compose(
            model, optax.sgd(config.learning_rate), supervised(squared_error), *components[method], tasks=stream.tasks
        )
        program = jit(jax.vmap(course_of(learner, stream, probe, "loss"), in_axes=(None, None, 0)))
        keys = jax.vmap(jax.random.key)(jnp.arange(config.runs))
        run = functools.partial(program, stream.tasks, stream.data, keys)
        part = kept(directory / f"{method}.json".replace(" ", "_"), run)
        part["seconds"] = [part["seconds"] / config.runs] * config.runs
        found[method] = {name: np.array(values) for name, values in part.items()}
    return found


def parts_of_the_course(found: dict[str, dict[str, Any]], scale: float) -> dict[tuple[str, str], dict[str, Any]]:
    """The online score of the first and the last tenth of the tasks, as cells of a table."""
    n = max(next(iter(found.values()))["online"].shape[1] // 10, 1)
    cells = {}
    for place, part in (("first", slice(None, n)), ("last", slice(-n, None))):
        for method, values in found.items():
            scores = scale * values["online"][:, part].mean(1)
            cells[f"{place} {n} tasks", method] = {"scores": scores, "seconds": values["seconds"]}
    return cells


def show(title: str, cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    """One line per cell."""
    print(f"\n{title}")
    for (setting, method), cell in cells.items():
        s = statistics(cell["scores"])
        spread = f" ± {s.sd:.3f}" if s.n > 1 else ""
        print(f"  {setting:16s} {method:20s} {s.mean:8.3f}{spread} (n = {s.n})")


def main(config: Config) -> None:
    """Runs the studies, prints their tables, draws their figures."""
    for owner in ("permuted", "regression"):
        for field, value in dataclasses.asdict(getattr(config, owner)).items():
            if isinstance(value, int | float) and value < (0 if isinstance(value, float) else 1):
                raise SystemExit(f"{owner}.{field} is {value}, but it must be at least {int(isinstance(value, int))}")
    enable_compilation_cache()
    command = shown_command("experiments.plasticity", sys.argv[1:])

    def finished(name: str, benchmark: str, cells: Any, note: str, directory: Path) -> None:
        path = RESULTS / f"{name}.json" if config.record else directory / "results.json"
        record(name, benchmark, command, cells, {}, dict.fromkeys(cells, note), path)
        print(f"results: {path}")

    if config.study != "regression":
        images = load_images(config.data_dir, config.source)
        if len(images.train_labels) < config.permuted.images:
            raise SystemExit(
                f"permuted.images is {config.permuted.images}, but there are only {len(images.train_labels)}"
            )
        directory = Path(config.directory) / "permuted_mnist"
        settled = dataclasses.asdict(config.permuted)
        settle_run(directory, {k: v for k, v in settled.items() if k not in ("seeds", "methods")}, images)
        found = study_permuted(config.permuted, images, directory)
        cells = parts_of_the_course(found, 100)
        title = f"online permuted MNIST, {config.permuted.tasks} tasks"
        show(f"{title}: online accuracy (%)", cells)
        print(f"figure: {figure_permuted(config.permuted, found, directory)}")
        finished("plasticity_permuted_mnist", title, cells, "online accuracy", directory)
    if config.study != "permuted_mnist":
        directory = Path(config.directory) / "regression"
        settled = dataclasses.asdict(config.regression)
        try:
            settle_config(directory, {k: v for k, v in settled.items() if k != "methods"})
        except ConfigError as error:
            raise SystemExit(str(error)) from error
        found = study_regression(config.regression, directory)
        cells = parts_of_the_course(found, 1)
        title = f"slowly-changing regression, {config.regression.tasks} tasks of {config.regression.steps} rows"
        show(f"{title}: squared error", cells)
        print(f"figure: {figure_regression(config.regression, found, directory)}")
        finished("plasticity_regression", title, cells, "squared error, not percent", directory)


def figure_permuted(config: Permuted, found: dict[str, dict[str, Any]], directory: Path) -> Path:
    """Online accuracy, silent units, and rank of the last hidden layer, against tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels = (
        ("online", 100, "online accuracy (%)"),
        ("dormant", 100, "dormant units (%)"),
        ("rank", 1, "effective rank of the last hidden layer"),
    )
    for place, (field, scale, label) in zip(axes, panels, strict=True):
        runs = {method: scale * values[field] for method, values in found.items()}
        tasks = np.arange(config.tasks, 0, -1 if field == "online" else -config.probe_every)[::-1]
        course(place, tasks, runs)
        place.set_xlabel("task")
        place.set_ylabel(label)
    axes[0].legend(fontsize=8)
    path = directory / "online_accuracy.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def figure_regression(config: Regression, found: dict[str, dict[str, Any]], directory: Path) -> Path:
    """Squared error against rows seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
    rows = config.steps * np.arange(1, config.tasks + 1)
    course(axes, rows, {method: values["online"] for method, values in found.items()}).legend(fontsize=8)
    axes.set_xlabel("rows seen")
    axes.set_ylabel("squared error, mean over a task")
    path = directory / "error.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
