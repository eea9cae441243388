"""What is told of `experiments.self_distillation`: gain, forgetting and drift, the claim, its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_zoo.evaluation.metrics import statistics
from experiments.common import Found, Report, drawing
from experiments.self_distillation_bench import IN_CONTEXT, METHODS, Config

PUBLISHED = {  # new task, mean of the prior suite; Qwen2.5-7B-Instruct before: 32.1, 42.9, 30.1 and 65.5
    "sft": ((66.2, 53.4), (63.2, 56.0), (35.5, 60.2)),
    "sft + re-invoke": ((66.0, 60.2), (63.1, 63.7), (35.6, 62.6)),
    "dft": ((54.8, 60.2), (64.2, 60.8), (36.2, 64.0)),
    "sdft forward": ((70.2, 64.5), (70.6, 65.4), (40.2, 65.4)),
}
SUITES = ("Science", "Tool use", "Medical")
FIELDS = {
    "new": "new skills",
    "retained": "known skills, at the end",
    "per gain": "forgetting per unit of gain",
    "drift": "drift, nats per token of text",
}

Runs = dict[tuple[str, float], list[dict[str, Any]]]
"""By method and rate, the runs of all seeds."""


def runs_of(found: Found) -> Runs:
    """What was found, seed by seed."""
    return {
        (method, float(rate)): [
            jax.tree.map(lambda values, seed=seed: values[seed], cell) for seed in range(len(cell["seconds"]))
        ]
        for (rate, method), cell in found.items()
    }


def report(config: Config, found: Found) -> Report:
    """Ours in this setting, and beside it the paper's in theirs, which is another."""
    cells = runs_of(found)
    rates = dict(cells)  # of each method, its one rate
    rows: Found = {}
    for field, setting in FIELDS.items():
        for (method, _), runs in cells.items():
            factor = 1 if field in ("per gain", "drift") else 100
            values = factor * np.array([summary(run)[field] for run in runs])
            if np.isfinite(values).all():
                rows[setting, method] = {"scores": values, "seconds": [run["seconds"] for run in runs]}
    theirs = "; ".join(
        f"{method}: " + ", ".join(f"{suite} {a} / {b}" for suite, (a, b) in zip(SUITES, pairs))
        for method, pairs in PUBLISHED.items()
    )
    judged = claim(cells)
    published = (
        "Published with Qwen2.5-7B-Instruct (Shenfeld et al. 2026, arXiv 2601.19897; new task / mean of six earlier"
        f" benchmarks, 32.1, 42.9 and 30.1 / 65.5 before): {theirs}. That setting is not attempted here."
    )
    what = "A small language" if config.model is None else Path(config.model).stem
    return Report(
        table(cells) + "\n" + "\n".join(judged),
        f"{what} learns skills from demonstrations",
        rows,
        notes={(setting, m): note(config, rates[m], cells[m, rates[m]]) for setting, m in rows},
        remarks=[*judged, published],
        name="self_distillation" if config.model is None else "self_distillation_model",
    )


def summary(cell: dict[str, Any]) -> dict[str, float]:
    """The numbers of the table, of one run."""
    before, after = cell["before"], cell["after"]
    learned = np.diag(np.array(after["new"]))
    fallen = [np.array(before["held"]) - np.array(after["held"][-1]), (learned - np.array(after["new"][-1]))[:-1]]
    gain = float(np.mean(learned - np.array(before["new"])))
    forgetting = float(np.mean(np.concatenate(fallen)))
    return {
        "new": float(learned.mean()),
        "validation": float(np.diag(np.array(after["validation"])).mean()),
        "gain": gain,
        "retained": float(np.mean(after["held"][-1])),
        "forgetting": forgetting,
        "per gain": forgetting / gain if gain > 0.05 else float("nan"),
        "drift": float(after["drift"][-1]),
        "perplexity": float(after["perplexity"][-1]),
        "before": float(before["perplexity"]),
    }


def chosen(cells: Runs) -> dict[str, float]:
    """Of each method, the smallest rate whose validation score is within a point of its best."""
    scores: dict[str, dict[float, float]] = {}
    for (method, rate), runs in cells.items():
        scores.setdefault(method, {})[rate] = float(np.mean([summary(cell)["validation"] for cell in runs]))
    return {m: min(rate for rate, s in tried.items() if s >= max(tried.values()) - 0.01) for m, tried in scores.items()}


def table(cells: Runs) -> str:
    """A row for each method at its rate."""
    names = ("new", "retained", "forgetting", "per gain", "drift", "perplexity")
    lines = [f"{'':24s}{'rate':>8s}" + "".join(f"{name:>18s}" for name in names) + f"{'tokens':>10s}{'GFLOP':>10s}"]
    for (method, rate), runs in cells.items():
        row = f"{method:24s}{rate:>8g}"
        for name in names:
            factor = 100 if name in ("new", "retained", "forgetting") else 1
            s = statistics(factor * np.array([summary(cell)[name] for cell in runs]))
            row += f"{f'{s.mean:.3g} ± {s.sd:.2g}' if s.n > 1 else f'{s.mean:.3g}':>18s}"
        lines.append(row + f"{runs[0]['tokens']:>10.0f}{runs[0]['operations'] / 1e9:>10.1f}")
    perplexity = np.mean([summary(cell)["before"] for runs in cells.values() for cell in runs if runs[0]["tokens"]])
    said = "tokens and operations of a skill's updates; drift in nats per token of text"
    return "\n".join(lines) + f"\nnew, retained and forgetting in %; {said}; perplexity before: {perplexity:.3g}"


def fall_at(cell: dict[str, Any], gain: float) -> float:
    """How far the known skills have fallen when the first new one has risen by `gain`, linear between the points of
    the curve; nan where it never does, or the curve has one point."""
    before, new, held = cell["before"], np.array(cell["curve"]["new"]), np.array(cell["curve"]["held"])
    gains = np.array([0.0, *(new[0, :, 0] - before["new"][0])])
    falls = np.array([0.0, *(np.mean(before["held"]) - held[0].mean(axis=-1))])
    if gains.size < 3 or gains.max() < gain:
        return float("nan")
    after = int(np.argmax(gains >= gain))
    return float(np.interp(gain, gains[after - 1 : after + 1], falls[after - 1 : after + 1]))


def claim(cells: Runs) -> list[str]:
    """Whether less is forgotten at equal gain, judged by one measure, seed by seed; nothing where one of the two
    methods was not run, or learned nothing."""
    from scipy.stats import ttest_rel

    runs = {method: found for (method, _), found in cells.items()}
    if not {"sft", "sdft forward"} <= set(runs):
        return []

    def both(measure: Callable[[dict[str, Any]], float]) -> np.ndarray:
        return np.array([[measure(run) for run in runs[method]] for method in ("sft", "sdft forward")])

    what = "Fall of the known skills when the first new one has risen by 90 %"
    found = both(lambda run: fall_at(run, 0.9))
    if not np.isfinite(found).all():
        what, found = "Forgetting per unit of gain, at the end", both(lambda run: summary(run)["per gain"])
    if not np.isfinite(found).all():
        return []
    sft, sdft = found
    p = float(ttest_rel(sft, sdft).pvalue) if sft.size > 1 else float("nan")
    verdict = ("confirmed" if sdft.mean() < sft.mean() else "refuted") if p < 0.05 else "undecided"
    return [
        f"{what}: {sdft.mean():.3f} with sdft forward, {sft.mean():.3f} with sft; lower in {np.sum(sdft < sft)} of"
        f" {sft.size} seeds, p = {p:.2g} (paired t-test). That less is forgotten is {verdict} at this scale."
    ]


def figures(found: Found, directory: Path) -> list[Path]:
    """New skills against what is retained, a point for each method; drift by update."""
    cells = runs_of(found)
    looks = {method: {"color": f"C{i}", "marker": "os^vD<>pP*"[i % 10]} for i, method in enumerate(METHODS)}
    beside = {"fontsize": 7, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    paths = [directory / "new_against_retained.png", directory / "drift.png"]
    n = max(len(runs) for runs in cells.values())
    with drawing(paths[0], size=(6.4, 3.8)) as ((axes,),):
        for (method, _), runs in cells.items():
            values = 100 * np.array([[summary(run)[field] for field in ("new", "retained")] for run in runs])
            (x, y), spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else (0.0, 0.0)
            axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], **looks[method], label=method, elinewidth=0.8)
        axes.set(xlabel="new skills, % right just after each", ylabel="known skills, % right at the end")
        axes.set_title(f"mean and standard deviation over {n} seeds" if n > 1 else "one seed", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(**beside)
    with drawing(paths[1], size=(6.4, 3.8)) as ((axes,),):
        for (method, _), runs in cells.items():
            if method != IN_CONTEXT:
                drift = np.mean([np.ravel(run["curve"]["drift"]) for run in runs], axis=0)
                steps = np.size(runs[0]["loss"]) // len(drift)
                axes.plot(steps * np.arange(len(drift) + 1), [0, *drift], **looks[method], label=method, markersize=3)
        axes.set(xlabel="updates", ylabel="KL(before || after), nats per token of text")
        axes.grid(alpha=0.3)
        axes.legend(**beside)
    return paths


def note(config: Config, rate: float, runs: list[dict[str, Any]]) -> str:
    """What must be known of a row."""
    said = f"rate {rate:g}" if rate else "no update"
    if rate == max(config.rates):
        said += ", the largest tried"
    if not np.mean([summary(run)["gain"] for run in runs]) > 0.05:
        said += "; nothing was learned"
    return said
