"""Test-time training and Tent on corrupted images: digits here, CIFAR-10-C for who has it.

Command                                                   hardware       time       expected
python -m experiments.corrupted_digits                    1 CPU core                figures on the embedded digits
python -m experiments.corrupted_digits --data-dir DATA \\
    --record                                              1 CPU core     40 min     see the ledger
python -m experiments.corrupted_digits --dataset cifar10 --data-dir CIFAR \\
    --corrupted-dir CIFAR-10-C --seeds 1 \\
    --directory runs/corrupted_cifar10 --record           1 GPU          not run    published: Sun et al. 2020

Published, on CIFAR-10-C with a ResNet-26 and group normalisation (error): online < standard < joint on noise, and joint
about as good as the baseline. On digits nothing is published; the question is whether that order holds.

The nets are CNNs of two convolutions (8 and 16 channels) and 32 hidden units, small because every test image costs a
training step of 32 views (online) or ten (standard). "baseline" has group normalisation and learns the digits alone;
"joint", "ttt" and "ttt online" are one net of that kind which learns the turns too, by a head that branches off after
the first convolution and has a second one and 32 hidden units of its own. "source", "norm" and "tent" are one net
with batch normalisation. All learn with crops of 2 pixels and without flips, as a mirrored 2 is no 2. Quarter turns
are a fair task for digits, though not one that can be learned perfectly: half a turn leaves 0, 1 and 8 as they are,
and makes a 6 a 9. In each step a test image gives 32 crops, each turned at random; "ttt" takes ten steps and forgets
them, "ttt online" one step an image and keeps them within a condition; "tent" learns from batches of 100 within a
condition, "norm" answers by their statistics alone, "source" by those of training.

Conditions are the 15 corruptions of CIFAR-10-C at 5 severities, 1000 test images each, and two more kinds of noise.
Standard "ttt" is slow: it answers every fifth image of the 15 noise conditions (5 noises at severities 1, 3 and 5), and
so do all methods in the setting "noise, equal rows". Learning rates at test time are chosen on corrupted images that
were held out of training, by the first seed, among those in `PROTOCOLS`, the papers' first.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cl_zoo import Batch, Stream, TrainState
from cl_zoo.compilation import jit
from cl_zoo.datasets import CORRUPTIONS, NOISES, LabelledImages, load_cifar10
from cl_zoo.evaluation import evaluate_adapting
from cl_zoo.evaluation.metrics import confidence_interval, statistics
from cl_zoo.streams import conditions, corrupted_images
from cl_zoo.types import Array
from experiments.common import Cell, Found, Report, check_names, check_numbers, drawing, kept, load_images, study
from experiments.corrupted_digits_nets import METHODS, NETS, PROTOCOLS, Protocol, learner, trained

FAMILIES = {"noise": slice(0, 3), "blur": slice(3, 7), "weather": slice(7, 11), "digital": slice(11, 15)}


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


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds")
    check_names(config, methods=METHODS)
    protocol = PROTOCOLS["smoke" if config.protocol == "smoke" else config.dataset]
    images = load(config)
    noises = [name for name in NOISES if config.corrupted_dir is None or name in CORRUPTIONS]
    noisy = [f"{name}/{severity}" for name in noises for severity in protocol.noise_severities]
    asked: list[tuple[Any, Any]] = [(CORRUPTIONS, protocol.severities)]
    if others := [name for name in noises if name not in CORRUPTIONS]:
        asked.append((others, protocol.noise_severities))
    sizes = {"data_dir": config.corrupted_dir, "batch_size": protocol.test_batch, "examples": protocol.rows}
    everything = functools.cache(lambda: Conditions(images, asked, **sizes))
    nets = functools.cache(lambda seed, kind: trained(config.dataset, protocol, images, seed, kind))
    rates: dict[str, float] = {}

    def run(method: str, seed: int) -> dict[str, Any]:
        """Errors by condition: over all rows, and over those that every method answers."""
        state, tests = nets(seed, NETS[method]), everything()
        part: dict[str, Any] = {"only": noisy, "every": protocol.every} if method == "ttt" else {}
        begun = time.perf_counter()
        rows = tests.errors(config.dataset, protocol, method, rates.get(method, 0.0), state, **part)
        errors = {
            name: [None, float(each.mean())]
            if method == "ttt"
            else [float(each.mean()), float(each[:: protocol.every].mean())]
            for name, each in rows.items()
        }
        return {"errors": errors, "seconds": time.perf_counter() - begun}

    def cells(directory: Path) -> list[Cell]:
        """Every method, its rate chosen with the first seed."""
        rates.update(chosen_rates(config, protocol, images, functools.partial(nets, 0), directory))
        return [Cell("all", method, method, functools.partial(run, method)) for method in config.methods]

    def report(found: Found) -> Report:
        rows = summary(found, config.dataset, noisy)
        notes = {key: _interval(row["scores"]) for key, row in rows.items()}
        for (setting, method), note in notes.items():
            if method in rates:
                notes[setting, method] = f"{note}; rate {rates[method]:g}"
        digits = config.dataset == "mnist"
        return Report(
            f"\n{table(rows)}\n\nlearning rates at test time: {rates}",
            "corrupted MNIST, error" if digits else "CIFAR-10-C, error",
            rows,
            notes,
            lower_is_better=True,
            name="corrupted_digits" if digits else "corrupted_cifar10",
        )

    names = [f"{name}/{severity}" for each in asked for name, severity in conditions(*each)]
    draw = functools.partial(figures, names)
    settled = {"dataset": config.dataset, "protocol": protocol._asdict()}
    study("corrupted_digits", config, cells, report, draw, settled=settled, data={"images": images})


def load(config: Config) -> LabelledImages:
    """The images, or one line that says what is wrong with their files."""
    if config.dataset == "mnist":
        return load_images(config)
    try:
        return load_cifar10(config.data_dir, "tfds" if config.source == "tfds" else None)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


class Conditions:
    """Images under corruptions, made once.

    Args:
      images: of which the test images are corrupted.
      asked: pairs of corruptions and severities.
      options: of `corrupted_images`.
    """

    def __init__(self, images: LabelledImages, asked: list[tuple[Any, Any]], **options: Any):
        self.streams = {
            tuple(f"{name}/{severity}" for name, severity in conditions(corruptions, severities)): corrupted_images(
                images,
                corruptions=corruptions,
                severities=severities,
                evaluation_batch=options["examples"],
                **options,
            )
            for corruptions, severities in asked
        }
        self.names = [name for names in self.streams for name in names]

    def errors(
        self,
        dataset: str,
        protocol: Protocol,
        method: str,
        rate: float,
        state: TrainState,
        *,
        only: list[str] | None = None,
        every: int = 1,
    ) -> dict[str, np.ndarray]:
        """Whether each row of each condition (of those named by `only`) is answered wrongly, in percent; of the rows
        one in `every`."""
        reset = "task" if method in ("ttt online", "tent", "norm") else "batch"
        rows = 1 if method.startswith("ttt") else protocol.test_batch
        found: dict[str, np.ndarray] = {}
        for names, stream in self.streams.items():
            places = [i for i, name in enumerate(names) if only is None or name in only]
            if not places:
                continue
            part = some_of(stream, places, every)
            answers = learner(dataset, protocol, method, stream.tasks, rate)
            together = 50 if method == "ttt" and jax.default_backend() != "cpu" else 1
            options: dict[str, Any] = {"reset": reset, "batch_size": rows, "together": together, "by_example": True}
            adapting = jit(lambda answers, part, state, o=options: evaluate_adapting(answers, part, state, **o)[0])
            scores = adapting(answers, part, state)
            found |= zip((names[i] for i in places), 100 * (1 - np.asarray(scores)), strict=True)
        return found


def some_of(stream: Stream, places: list[int], every: int) -> Stream:
    """The stream with these of its tasks alone, and of their rows one in `every`."""
    of_all = stream.evaluation_function

    def evaluation(data: Any, task: Array, split: str) -> Batch:
        return jax.tree.map(lambda leaf: leaf[:, ::every], of_all(data, jnp.asarray(places)[task], split))

    return dataclasses.replace(stream, n_tasks=len(places), evaluation_function=evaluation)


def chosen_rates(
    config: Config, protocol: Protocol, images: LabelledImages, nets: Callable[[str], TrainState], directory: Path
) -> dict[str, float]:
    """Of each method that has several, the one of least mean error over all corruptions at the strongest severity of
    images held out of training."""
    held_out = LabelledImages(
        images.train_images[:0],
        images.train_labels[:0],
        *(each[len(each) - protocol.held_out :] for each in images[:2]),
    )
    rows = min(protocol.rows, len(held_out.test_labels))
    strongest = [(CORRUPTIONS, protocol.severities[-1:])]
    options = {"examples": rows, "batch_size": protocol.test_batch, "progress": False}
    tests = functools.cache(lambda: Conditions(held_out, strongest, **options))

    def tried(method: str) -> dict[str, Any]:
        state, every = nets(NETS[method]), rows // protocol.search_rows[method]

        def error(rate: float) -> float:
            found = tests().errors(config.dataset, protocol, method, rate, state, every=every)
            return float(np.mean(list(found.values())))

        errors = {rate: error(rate) for rate in protocol.rates[method]}
        return {"chosen": min(errors, key=errors.__getitem__), "tried": {str(r): e for r, e in errors.items()}}

    chosen = {}
    for method, rates in protocol.rates.items():
        chosen[method] = rates[0]
        if len(rates) > 1 and method in config.methods:
            path = directory / "rates" / f"{method}.json".replace(" ", "_")
            chosen[method] = kept(path, functools.partial(tried, method))["chosen"]
    return chosen


def summary(found: Found, dataset: str, noisy: list[str]) -> Found:
    """Rows of the ledger."""
    cells = {method: cell for (_, method), cell in found.items()}
    whole = [method for method in cells if method != "ttt"]
    rows: Found = {}

    def add(setting: str, method: str, names: list[str], which: int) -> None:
        errors = [cells[method]["errors"][name][:, which] for name in names]
        rows[setting, method] = {"scores": np.mean(errors, axis=0), "seconds": cells[method]["seconds"]}

    if dataset == "cifar10":
        for name in CORRUPTIONS:
            for method, cell in cells.items():
                if f"{name}/5" in cell["errors"]:
                    add(f"CIFAR-10-C, severity 5, {name}", method, [f"{name}/5"], 1)
        for method in whole:
            add("CIFAR-10-C, severity 5, mean of 15", method, [f"{name}/5" for name in CORRUPTIONS], 0)
        return rows
    for method in cells:
        add("noise, equal rows", method, noisy, 1)
    for family, members in {**FAMILIES, "all 15": slice(None)}.items():
        for method in whole:
            names = [name for name in cells[method]["errors"] if name.split("/")[0] in CORRUPTIONS[members]]
            add(family, method, names, 0)
    return rows


def _interval(scores: np.ndarray) -> str:
    return f"95 % interval ± {_half_width(scores):.2f}" if np.size(scores) > 1 else ""


def _half_width(scores: np.ndarray) -> float:
    low, high = confidence_interval(scores)
    return float(high - low) / 2


def table(rows: Found) -> str:
    """Error in percent: mean and half of its 95 % interval over seeds."""
    settings, methods = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    lines = [f"{'error (%)':<36s}" + "".join(f"{method:>16s}" for method in methods)]
    for setting in settings:
        line = f"{setting:<36s}"
        for method in methods:
            if (setting, method) not in rows:
                line += f"{'':>16s}"
                continue
            scores = rows[setting, method]["scores"]
            s = statistics(scores)
            line += f"{s.mean:>9.2f} ± {_half_width(scores):4.2f}" if s.n > 1 else f"{s.mean:>9.2f}       "
        lines.append(line)
    return "\n".join(lines)


def figures(names: list[str], found: Found, directory: Path) -> list[Path]:
    """Mean error by corruption and severity, a panel for each method; what it did not answer is left white."""
    corruptions = list(dict.fromkeys(name.split("/")[0] for name in names))
    severities = sorted({int(name.split("/")[1]) for name in names})
    path = directory / "errors.png"
    with drawing(path, 1, len(found), size=(2.2 / len(found) + 1.7, 5.6), sharey=True) as axes:
        for panel, ((_, method), cell) in zip(axes[0], found.items(), strict=True):
            errors = np.full((len(corruptions), len(severities)), np.nan)
            for name, values in cell["errors"].items():
                corruption, severity = name.split("/")
                place = corruptions.index(corruption), severities.index(int(severity))
                errors[place] = np.mean(values[:, int(np.isnan(values[0, 0]))])
            image = panel.imshow(errors, vmin=0, vmax=60, cmap="viridis_r", aspect="auto")
            panel.set_title(method, fontsize=9)
            panel.set_xticks(range(len(severities)), severities)
            panel.set_yticks(range(len(corruptions)), [name.replace("_", " ") for name in corruptions], fontsize=8)
            for (row, column), value in np.ndenumerate(errors):
                if np.isfinite(value):
                    colour = "white" if value > 35 else "black"
                    panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        axes[0, 0].set_ylabel("corruption")
        axes[0, 0].figure.supxlabel("severity", fontsize=9)
        axes[0, 0].figure.colorbar(image, ax=axes, label="error (%)", extend="max")
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
