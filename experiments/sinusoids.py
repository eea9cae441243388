"""Sinusoids from a few points: MAML, first-order MAML, Meta-SGD and Reptile.

Command                                                   hardware       time       expected
python -m experiments.sinusoids --iterations 5000         2 CPU cores               errors fall with every step
python -m experiments.sinusoids --record                  2 CPU cores    8 min      K = 10: MAML 0.36, Meta-SGD 0.21

Protocol of Finn et al. 2017 (arXiv 1703.03400): y = A sin(x - phi) with A in [0.1, 5], phi in [0, pi], x in [-5, 5];
MLP 40-40, kernels truncated normals of 0.01; 25 sinusoids in a batch, K points to learn from and K to be judged by;
Adam 1e-3, 70 000 iterations, one inner step; tested on 600 sinusoids with up to 10 steps. Their paper says the inner
rate 0.01, their code 0.001: both are here. Meta-SGD draws its rates from U(0.005, 0.1) (Li et al. 2017, arXiv
1707.09835, whose table 1 is what ours stand beside: mean squared error after one step). Reptile (arXiv 1803.02999) has
no figure for this protocol: 5 steps of SGD 0.02 on K of 2 K points, and an outer rate that falls from 1 to 0, our
choice.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import Batch, Learner, Stream, TrainState, at, compose, maml, reptile, run_stream
from cl_zoo.estimators.inner_loop import inner_loop, per_parameter_rates
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import sinusoids
from cl_zoo.wrappers import episodic, with_learning_rates
from experiments.common import Cell, Found, Report, all_but, check_numbers, drawing, run_cells, study

Method = Literal["maml", "maml 0.001", "fomaml", "fomaml 0.001", "meta-sgd", "reptile"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    shots: tuple[int, ...] = (5, 10, 20)
    """K in training; each is tested with all of them."""
    methods: tuple[Method, ...] = ("maml", "maml 0.001", "fomaml", "fomaml 0.001", "meta-sgd", "reptile")
    iterations: int = 70_000
    meta_batch: int = 25
    test_tasks: int = 600
    test_steps: int = 10
    seed: int = 0
    directory: str = "runs/sinusoids"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def learner_of(method: str, shots: int, iterations: int) -> tuple[Learner, Any]:
    """A learner, and the inner optimiser as a function of its parameters."""
    network = mlp((1,), 1, hidden=(40, 40), initialiser="truncated_normal")
    adam, model = optax.adam(1e-3), episodic(network)
    if method == "meta-sgd":
        learner = compose(with_learning_rates(model, 0.005, 0.1), adam, maml(squared_error, inner="learned"))
        return learner, lambda params: (params["params"], per_parameter_rates(params["learning_rates"]))
    if method == "reptile":
        inner = optax.sgd(0.02)
        outer = optax.sgd(optax.linear_schedule(1.0, 0.0, iterations))
        return compose(model, outer, reptile(squared_error, inner=inner, inner_batch_size=shots)), lambda params: (
            params,
            inner,
        )
    rate = 0.001 if "0.001" in method else 0.01
    component = maml(squared_error, inner=optax.sgd(rate), order=1 if method.startswith("fomaml") else 2)
    return compose(model, adam, component), lambda params: (params, optax.sgd(rate))


def errors_along(inner: Any, params: Any, tests: Batch, steps: int) -> jax.Array:
    """Squared error on the query of every episode after 0, 1, ..., `steps` steps on its support, `[E, steps + 1]`."""
    network, optimiser = inner(params)
    apply = mlp((1,), 1, hidden=(40, 40)).apply

    def error(phi: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(squared_error(apply(phi, {}, x)[0], y))

    def one(x: Any, y: jax.Array) -> jax.Array:
        _, after = inner_loop(
            lambda phi, _: error(phi, x.support_x, x.support_y),
            network,
            optimiser,
            steps,
            each=lambda phi, _: error(phi, x.query_x, y),
        )
        return jnp.concatenate([error(network, x.query_x, y)[None], after])

    return jax.vmap(one)(tests.x, tests.y)


def answers_along(inner: Any, params: Any, x: Any, grid: jax.Array, steps: int) -> jax.Array:
    """What the network answers on a grid before and after each step on one support, `[steps + 1, len(grid)]`."""
    network, optimiser = inner(params)
    apply = mlp((1,), 1, hidden=(40, 40)).apply

    def answer(phi: Any) -> jax.Array:
        return apply(phi, {}, grid[:, None])[0][:, 0]

    def loss(phi: Any, _: Any) -> jax.Array:
        return jnp.mean(squared_error(apply(phi, {}, x.support_x)[0], x.support_y))

    _, after = inner_loop(loss, network, optimiser, steps, each=lambda phi, _: answer(phi))
    return jnp.concatenate([answer(network)[None], after])


def run(config: Config, method: str, shots: int, seed: int) -> dict[str, Any]:
    """Trains, tests with all numbers of shots."""
    stream = sinusoids(steps=config.iterations, shots=shots, queries=shots, batch_size=config.meta_batch)
    learner, inner = learner_of(method, shots, config.iterations)
    sizes: dict[str, Any] = {"evaluation_size": config.test_tasks, "evaluation_batch": config.test_tasks}
    others = {tested: sinusoids(shots=tested, queries=100, **sizes) for tested in config.shots}
    tests = {tested: jax.tree.map(lambda leaf: leaf[0], each.evaluation(0, "test")) for tested, each in others.items()}
    x = jax.tree.map(lambda leaf: leaf[2], tests[shots].x)

    def errors(learner: Learner, state: TrainState, stream: Stream, key: jax.Array) -> dict[int, jax.Array]:
        return {k: errors_along(inner, state.params, each, config.test_steps) for k, each in tests.items()}

    def answers(learner: Learner, state: TrainState, stream: Stream, key: jax.Array) -> jax.Array:
        return answers_along(inner, state.params, x, jnp.linspace(-5, 5, 101), config.test_steps)

    begun = time.perf_counter()
    measure = {"errors": at("end", errors), "answers": at("end", answers)}
    result = run_stream(learner, stream, jax.random.key(seed), measure=measure)
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "losses": np.asarray(result.metrics["loss"][0].reshape((100, -1)).mean(1)).tolist(),
        "errors": {str(k): np.asarray(values).tolist() for k, values in result.measures["errors"].items()},
        "fit": {
            "answers": np.asarray(result.measures["answers"]).tolist(),
            "support": np.concatenate([x.support_x, x.support_y[:, None]], axis=1).tolist(),
            "query": np.concatenate([x.query_x, tests[shots].y[2][:, None]], axis=1).tolist(),
        },
    }


def cells(config: Config) -> list[Cell]:
    """Every method with every number of shots."""

    def cell(method: str, shots: int) -> Cell:
        return Cell(f"{shots} shots", method, f"{method}-{shots}", lambda seed: run(config, method, shots, seed))

    return [cell(method, shots) for shots in config.shots for method in config.methods]


def by_shots(found: Found) -> dict[tuple[str, int], dict[str, Any]]:
    """The one seed's runs, by method and number of shots in training; errors in the order of shots."""
    runs = {}
    for (setting, method), cell in found.items():
        run = jax.tree.map(lambda values: values[0], cell)
        run["errors"] = dict(sorted(run["errors"].items(), key=lambda item: int(item[0])))
        runs[method, int(setting.split()[0])] = run
    return runs


def run_all(config: Config, directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs by themselves, for a notebook."""
    return by_shots(run_cells(cells(config), directory, [config.seed]))


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    check_numbers(config, "iterations", "meta_batch", "test_tasks", "test_steps")
    if config.iterations % 100:
        raise SystemExit(f"iterations is {config.iterations}, but it must be a multiple of 100")

    def report(found: Found) -> Report:
        runs, rows = by_shots(found), {}
        for (method, trained), each in runs.items():
            for tested, errors in each["errors"].items():
                name = f"trained with {trained}, tested with {tested}", method
                rows[name] = {"scores": errors[:, 1], "seconds": [each["seconds"]]}
        title = f"\nMean squared error after one step, {config.test_tasks} sinusoids, mean ± 95 % interval"
        return Report(
            f"{title}\n{table(runs)}\n",
            "sinusoids from a few points: squared error after one step, not percent; n counts test tasks",
            rows,
            {name: "inner rate 0.001" if "0.001" in name[1] else "" for name in rows},
            lower_is_better=True,
        )

    settled = all_but(config, "shots", "methods")
    study("sinusoids", config, cells(config), report, figures, settled=settled, seeds=[config.seed])


def interval(errors: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over episodes and half the width of its 95 % interval."""
    errors = np.asarray(errors)
    with np.errstate(over="ignore", invalid="ignore"):  # where descent diverges
        return errors.mean(0), 1.96 * errors.std(0, ddof=1) / np.sqrt(len(errors))


def table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """A row for each method and number of training shots, a column for each number of test shots."""
    tested = list(next(iter(found.values()))["errors"])
    lines = [f"{'trained with':28s}" + "".join(f"{f'{k} shots':>16s}" for k in tested) + f"{'s':>8s}"]
    for (method, shots), cell in found.items():
        row = f"{f'{shots} shots, {method}':28s}"
        for errors in cell["errors"].values():
            mean, width = interval(errors)
            row += f"{mean[1]:>9.2f} ± {width[1]:4.2f}"
        lines.append(row + f"{cell['seconds']:8.0f}")
    return "\n".join(lines)


def draw_adaptation(panels: Any, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Error against steps with 95 % intervals, an axes for each number of shots."""
    shots = list(dict.fromkeys(k for _, k in found))
    for panel, k in zip(panels, shots, strict=True):
        for (method, trained), cell in found.items():
            if trained == k:
                mean, width = interval(cell["errors"][str(k)])
                steps = np.arange(len(mean))
                (line,) = panel.plot(steps, mean, label=method)
                panel.fill_between(steps, mean - width, mean + width, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_yscale("log")
        panel.set_ylim(0.01, 10)  # what was trained for one step may diverge on some sinusoid when it takes many
        panel.set_xlabel("gradient steps at test")
        panel.set_title(f"K = {k}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean squared error, 95 % interval")
    panels[0].legend(fontsize=8)


def draw_fits(rows: Any, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """One sinusoid, and what is answered before and after learning: a row per number of shots, a column per method."""
    shots = list(dict.fromkeys(k for _, k in found))
    methods = list(dict.fromkeys(method for method, _ in found))
    for row, k in zip(rows, shots, strict=True):
        for panel, method in zip(row, methods, strict=True):
            fit = found[method, k]["fit"]
            answers, query, support = (np.array(fit[name]) for name in ("answers", "query", "support"))
            query = query[np.argsort(query[:, 0])]
            panel.plot(query[:, 0], query[:, 1], color="grey", linewidth=2, alpha=0.5, label="target")
            grid = np.linspace(-5, 5, answers.shape[1])
            for step, style in ((0, ":"), (1, "--"), (len(answers) - 1, "-")):
                panel.plot(grid, answers[step], style, color="C0", linewidth=1, label=f"{step} steps")
            panel.plot(support[:, 0], support[:, 1], "^", color="C3", markersize=4, label="support")
            panel.set_title(f"{method}, K = {k}", fontsize=8)
    rows[0][0].legend(fontsize=6)


def figures(found: Found, directory: Path) -> list[Path]:
    """Adaptation curves; fits before and after."""
    paths, runs = [directory / "adaptation.png", directory / "fits.png"], by_shots(found)
    n_shots, n_methods = (len({key[i] for key in runs}) for i in (1, 0))
    with drawing(paths[0], 1, n_shots) as axes:
        draw_adaptation(axes[0], runs)
    with drawing(paths[1], n_shots, n_methods, size=(2.6, 2.2), sharex=True, sharey=True) as axes:
        draw_fits(axes, runs)
    return paths


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
