"""What studies of learning along a sequence share: the same decoder without learning, and with it, trained and not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo import Batch, Learner, Model, Stream, TrainState, at, compose, supervised, sweep
from cl_zoo.evaluation.metrics import confidence_interval
from cl_zoo.language import Decoder, ttt_e2e
from cl_zoo.losses import next_token_loss
from experiments.common import (
    Cell,
    Found,
    Report,
    check_names,
    check_numbers,
    drawing,
    kept,
    mean_and_spread,
    study,
    warmed_up_adam,
)

METHODS = ("none", "attention", "ttt-e2e")
"""How a net is trained."""
ALSO = {"none": "dynamic evaluation", "ttt-e2e": "ttt-e2e, rate 0"}
"""The same net, tested otherwise: with steps along the sequence, or without."""
SHOWN = ("none", "attention", "dynamic evaluation", "ttt-e2e", "ttt-e2e, rate 0")
CHOOSING = 100
"""The seed by which rates are chosen."""


class Config(Protocol):
    """What the settings of such a study have."""

    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def inner_rates(self) -> tuple[float, ...]: ...


class Problem(NamedTuple):
    """Attributes:
    settings: names.
    choosing: that by which rates are chosen.
    stream: of a setting.
    above_best: `(setting, stream, batch, outputs) -> [B, L]`, the loss above the best possible at each place.
    net: by method.
    fast: what moves along a sequence, and how often.
    clip: of those steps.
    """

    settings: tuple[str, ...]
    choosing: str
    stream: Callable[[str], Stream]
    above_best: Callable[[str, Stream, Batch, Any], Any]
    net: Callable[[str], Decoder]
    fast: Mapping[str, int]
    clip: float


def learner_of(problem: Problem, steps: int, method: str, rates: Any) -> Learner:
    """By its outer and inner rate."""
    plain = problem.net(method)
    learning = method == "ttt-e2e"
    made = ttt_e2e(plain, problem.fast, rate=rates["inner"], clip=problem.clip) if learning else plain
    return compose(made.model, warmed_up_adam(rates["outer"], steps), supervised(next_token_loss))


def losses(
    problem: Problem,
    method: str,
    setting: str,
    split: str,
    inner_rates: Sequence[float],
    learner: Learner,
    state: TrainState,
    stream: Stream,
    key: Any,
) -> Any:
    """Above the best possible, at every place, the means over the sequences of a split: `[L]` of the net as it was
    trained, and `[I, L]` of the same net with other inner rates."""
    plain = problem.net(method)

    def loss(model: Model) -> Any:
        def one(batch: Batch) -> Any:
            outputs = model.apply(state.params, state.model_state, batch.x)[0]
            return jnp.mean(problem.above_best(setting, stream, batch, outputs), axis=0)

        return jnp.mean(jax.lax.map(one, stream.evaluation(0, split)), axis=0)

    made = [ttt_e2e(plain, problem.fast, rate=rate, clip=problem.clip) if rate else plain for rate in inner_rates]
    other = [loss(each.model) for each in made]
    return {"loss": loss(learner.model)} | ({"other": jnp.stack(other)} if other else {})


def trained(
    problem: Problem,
    config: Config,
    method: str,
    setting: str,
    rates: Any,
    seeds: Sequence[int],
    split: str,
    inner_rates: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """What `losses` gives, `[H, S, ...]`: all rates and seeds at once, since each is many small operations."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    n = len(jax.tree.leaves(rates)[0]) * len(seeds)
    measure = {"losses": at("end", partial(losses, problem, method, setting, split, inner_rates))}
    make = partial(learner_of, problem, config.steps, method)
    options: dict[str, Any] = {"measure": measure, "metrics": ["loss"], "batch_size": n, "progress": False}
    found = sweep(make, rates, problem.stream(setting), keys, **options).measures["losses"]
    return jax.tree.map(np.asarray, dict(found))


def chosen(problem: Problem, config: Config, method: str, folder: Path) -> dict[str, float]:
    """The best outer and inner rate by validation; kept once found. Of a net that is trained without steps, the inner
    rate is that with which dynamic evaluation is best."""
    learning = method == "ttt-e2e"
    grid = [(outer, i) for outer in config.rates for i in (config.inner_rates if learning else (0.0,))]

    def tried() -> dict[str, Any]:
        rates = {"outer": jnp.array([o for o, _ in grid]), "inner": jnp.array([i for _, i in grid])}
        others = config.inner_rates if method == "none" else ()
        found = trained(problem, config, method, problem.choosing, rates, [CHOOSING], "validation", others)
        means = {name: np.nan_to_num(each.mean((1, -1), dtype=np.float64), nan=1e9) for name, each in found.items()}
        best = int(np.argmin(means["loss"]))
        inner = config.inner_rates[int(np.argmin(means["other"][best]))] if "other" in means else grid[best][1]
        every = {name: each.tolist() for name, each in means.items()}
        return {"grid": grid, "outer": grid[best][0], "inner": inner, **every}

    found = kept(folder / "chosen" / f"{method}.json", tried)
    return {"outer": found["outer"], "inner": found["inner"]}


def run_study(
    name: str, config: Config, problem: Problem, benchmark: str, settled: Mapping[str, Any], place: str = "token"
) -> None:
    """Every method in every setting, all seeds at once; the published order by paired intervals; losses by place."""
    check_numbers(config, "seeds", "steps")
    check_names(config, methods=METHODS)
    notes: dict[tuple[str, str], str] = {}

    def cells(directory: Path) -> list[Cell]:
        return [cell(directory, setting, method) for setting in problem.settings for method in config.methods]

    def cell(directory: Path, setting: str, method: str) -> Cell:
        found = chosen(problem, config, method, directory)
        rates = {field: jnp.full((1,), value) for field, value in found.items()}

        others = {"none": (found["inner"],), "ttt-e2e": (0.0,)}.get(method, ())

        def run(seeds: Sequence[int]) -> dict[str, Any]:
            each = trained(problem, config, method, setting, rates, seeds, "test", others)
            return {name: values[0].tolist() for name, values in each.items()}

        rate, inner = f"rate {found['outer']:g}", f", inner {found['inner']:g}"
        notes[setting, method] = rate + (inner if method == "ttt-e2e" else "")
        if method in ALSO:
            notes[setting, ALSO[method]] = rate + inner
        return Cell(setting, method, f"{setting}-{method}", run, config.seeds)

    options: dict[str, Any] = {"settled": settled}
    study(name, config, cells, partial(report, benchmark, notes), partial(figures, place), **options)


def report(benchmark: str, notes: dict[tuple[str, str], str], found: Found) -> Report:
    """Nats above the best, and the published order by paired intervals."""
    found = shown(found)
    scores = {key: cell["loss"].mean(-1) for key, cell in found.items()}
    settings, methods = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [f"\n{'nats above the best':24s}" + "".join(f"{setting:>24s}" for setting in settings)]
    for method in methods:
        lines.append(f"{method:24s}" + "".join(f"{mean_and_spread(scores[s, method]):>24s}" for s in settings))
    remarks = []
    for low, high in (("ttt-e2e", "attention"), ("ttt-e2e", "dynamic evaluation"), ("dynamic evaluation", "none")):
        both = [s for s in settings if {(s, low), (s, high)} <= set(scores)]
        told = [difference(scores[s, low] - scores[s, high], s) for s in both]
        if told:
            remarks.append(f"{low} - {high}, nats, paired by seed, 95 % interval: {'; '.join(told)}.")
    rows = {key: {"scores": scores[key], "seconds": cell["seconds"]} for key, cell in found.items()}
    return Report("\n".join([*lines, *remarks]), benchmark, rows, notes, remarks, lower_is_better=True)


def shown(found: Found) -> Found:
    """Every net as it was trained, and the same tested otherwise."""
    lines: Found = {}
    for (setting, method), cell in found.items():
        lines[setting, method] = {"loss": cell["loss"], "seconds": cell["seconds"]}
        if method in ALSO:
            lines[setting, ALSO[method]] = {"loss": cell["other"][:, 0], "seconds": cell["seconds"]}
    return dict(sorted(lines.items(), key=lambda line: SHOWN.index(line[0][1])))


def difference(values: np.ndarray, setting: str) -> str:
    """A mean and its interval, and what it says."""
    low, high = confidence_interval(values) if len(values) > 1 else (-np.inf, np.inf)
    word = "lower" if high < 0 else "higher" if low > 0 else "undecided"
    return f"{setting} {values.mean():+.3f} ({low:+.3f} to {high:+.3f}, {word})"


def figures(place: str, found: Found, directory: Path) -> list[Path]:
    """Nats above the best against the place in the sequence, a panel for each setting."""
    path, found = directory / "by_place.png", shown(found)
    settings = list(dict.fromkeys(setting for setting, _ in found))
    n = len(next(iter(found.values()))["seconds"])
    with drawing(path, 1, len(settings), size=(3.6, 3.2), sharey=True) as (panels,):
        for axes, setting in zip(panels, settings, strict=True):
            for (here, method), cell in found.items():
                if here == setting:
                    i = SHOWN.index(method)
                    look = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-", "-.")[i], "linewidth": 1.2}
                    axes.plot(cell["loss"].mean(0), label=method, **look)
            axes.set(title=setting, xlabel=place)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"nats above the best (mean of {n} seeds)")
        panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return [path]
