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
are a fair task for digits, though not one that can be learnt perfectly: half a turn leaves 0, 1 and 8 as they are,
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
    Learner,
    Model,
    Stream,
    TaskInfo,
    TrainState,
    compose,
    enable_compilation_cache,
    supervised,
    tent,
    ttt,
)
from cl_zoo.algorithms.ttt import crop_and_flip
from cl_zoo.compilation import jit
from cl_zoo.datasets import LabelledImages
from cl_zoo.datasets.cifar import load_cifar10
from cl_zoo.datasets.corruptions import CORRUPTIONS, NOISES
from cl_zoo.evaluation import evaluate_adapting
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.models import cnn, resnet26, resnet_tail
from cl_zoo.streams._corrupted_images import conditions, corrupted_images
from cl_zoo.training.run_directory import write_json
from cl_zoo.types import Array, Key
from cl_zoo.wrappers import with_rotation_head
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


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    if unknown := set(config.methods) - set(METHODS):
        raise SystemExit(f"methods names {', '.join(sorted(unknown))}, but there are {', '.join(METHODS)}")
    enable_compilation_cache()
    protocol = PROTOCOLS["smoke" if config.protocol == "smoke" else config.dataset]
    directory = Path(config.directory)
    images = load(config)
    settle_run(directory, {"dataset": config.dataset, "protocol": json.loads(json.dumps(protocol._asdict()))}, images)
    (directory / "cells").mkdir(exist_ok=True)
    noises = [name for name in NOISES if config.corrupted_dir is None or name in CORRUPTIONS]
    asked = [(CORRUPTIONS, protocol.severities)]
    if others := [name for name in noises if name not in CORRUPTIONS]:
        asked.append((others, protocol.noise_severities))
    options = {"data_dir": config.corrupted_dir, "batch_size": protocol.test_batch, "rows": protocol.rows}
    everything = Conditions(images, asked, **options)
    noisy = [f"{name}/{severity}" for name in noises for severity in protocol.noise_severities]

    found: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    rates: dict[str, float] = {}
    with tqdm(total=config.seeds * len(config.methods), unit="run") as bar:
        for seed in range(config.seeds):
            nets = functools.cache(functools.partial(trained, config, protocol, images, seed))
            if seed == 0:
                rates = chosen_rates(config, protocol, images, nets, directory)
            for method in config.methods:
                bar.set_description(method)
                path = directory / "cells" / f"{method}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    state = nets(NETS[method])
                    begun = time.perf_counter()
                    part = {"only": noisy, "every": protocol.every} if method == "ttt" else {}
                    rows = everything.errors(config, protocol, method, rates.get(method, 0.0), state, **part)
                    # Over all rows of a condition, and over those that every method answers.
                    errors: dict[str, tuple[float | None, float]] = {
                        name: (None, float(each.mean()))
                        if method == "ttt"
                        else (float(each.mean()), float(each[:: protocol.every].mean()))
                        for name, each in rows.items()
                    }
                    write_json(path, {"errors": errors, "seconds": time.perf_counter() - begun})
                found[method].append(json.loads(path.read_text()))
                bar.update()
    settings = summary(found, config, noisy)
    print(f"\n{table(settings)}\n\nlearning rates at test time: {rates}")
    print(f"figure: {figure(found, everything.names, directory)}")
    name = "corrupted_digits" if config.dataset == "mnist" else "corrupted_cifar10"
    path = RESULTS / f"{name}.json" if config.record else directory / "results.json"
    notes = {key: _interval(cell["scores"]) for key, cell in settings.items()}
    for (setting, method), note in notes.items():
        if method in rates:
            notes[setting, method] = f"{note}; rate {rates[method]:g}"
    missing = [key for key in PUBLISHED if key not in settings]
    benchmark = "corrupted MNIST, error" if config.dataset == "mnist" else "CIFAR-10-C, error"
    command = shown_command("experiments.corrupted_digits", sys.argv[1:])
    more = {"lower_is_better": True, "not_attempted": missing}
    record(name, benchmark, command, settings, PUBLISHED, notes, path, **more)
    print(f"results: {path}")


def load(config: Config) -> LabelledImages:
    """The images, or one line that says what is wrong with their files."""
    if config.dataset == "mnist":
        return load_images(config.data_dir, config.source)
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
                evaluation_batch=options["rows"],
                **options,
            )
            for corruptions, severities in asked
        }
        self.names = [name for names in self.streams for name in names]

    def errors(
        self,
        config: Config,
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
            answers = learner(config, protocol, method, stream.tasks, rate)
            together = 50 if method == "ttt" and jax.default_backend() != "cpu" else 1
            program = functools.partial(
                evaluate_adapting, answers, part, reset=reset, rows=rows, together=together, by_row=True
            )
            scores, _ = jit(program)(part.data, state)
            found |= zip((names[i] for i in places), 100 * (1 - np.asarray(scores)), strict=True)
        return found


def some_of(stream: Stream, places: list[int], every: int) -> Stream:
    """The stream with these of its tasks alone, and of their rows one in `every`."""

    def evaluation(data: Any, task: Array, split: str) -> Batch:
        return jax.tree.map(lambda leaf: leaf[:, ::every], stream.evaluation(data, jnp.asarray(places)[task], split))

    return stream._replace(n_tasks=len(places), evaluation=evaluation)


def model(config: Config, kind: str) -> Model:
    """The network of a kind: "baseline" and "batch" have one head, "joint" has two."""
    norm = "batch" if kind == "batch" else "group"
    if config.dataset == "cifar10":
        scaled = lambda x: x.astype(jnp.float32) / 127.5 - 1  # noqa: E731
        net, tail = resnet26((32, 32, 3), 10, norm=norm, preprocess=scaled), resnet_tail(4, norm=norm)
        return with_rotation_head(net, tail, "group_3") if kind == "joint" else net
    options: dict[str, Any] = {"hidden": 32, "norm": norm, "groups": 2}
    net, head = cnn((28, 28), 10, channels=(8, 16), **options), cnn((14, 14, 8), 4, channels=(16,), **options)
    return with_rotation_head(net, head, "conv_1") if kind == "joint" else net


def learner(
    config: Config, protocol: Protocol, method: str, tasks: TaskInfo | None, rate: float = 0.0, size: int = 1
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
    return compose(model(config, kind), optimiser, *components, tasks=tasks)


def trained(config: Config, protocol: Protocol, images: LabelledImages, seed: int, kind: str) -> TrainState:
    """A net after training on all images but the last ones, which are held out."""
    kept = len(images.train_labels) - protocol.held_out
    teacher = learner(config, protocol, kind, None, size=kept)
    augment = crop_and_flip(protocol.pad, protocol.flip)

    def batch(x: Array, y: Array, key: Key) -> Batch:
        return Batch(augment(x, key), y, None, jnp.ones(y.shape[0]))

    @functools.partial(jit, donate_argnums=0)
    def epoch(state: TrainState, x: Array, y: Array, key: Key) -> TrainState:
        order = jax.random.permutation(key, kept)[: kept // protocol.batch * protocol.batch]

        def step(state: TrainState, index: Array) -> tuple[TrainState, None]:
            return teacher.update(state, batch(x[index], y[index], jax.random.fold_in(key, state.step)))[0], None

        return jax.lax.scan(step, state, order.reshape((-1, protocol.batch)))[0]

    x, y = jnp.asarray(images.train_images[:kept]), jnp.asarray(images.train_labels[:kept], jnp.int32)
    keys = jax.random.split(jax.random.key(seed), protocol.epochs + 1)
    state = jit(teacher.init)(keys[0], batch(x[:1], y[:1], keys[0]))
    for key in keys[1:]:
        state = epoch(state, x, y, key)
    return state


def chosen_rates(
    config: Config, protocol: Protocol, images: LabelledImages, nets: Callable[[str], TrainState], directory: Path
) -> dict[str, float]:
    """Of each method that has several, the one of least mean error over all corruptions at the strongest severity of
    images held out of training."""
    path = directory / "cells" / "rates.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    held_out = LabelledImages(
        images.train_images[:0],
        images.train_labels[:0],
        *(each[len(each) - protocol.held_out :] for each in images[:2]),
    )
    searched = [method for method in config.methods if len(protocol.rates.get(method, ())) > 1]
    kept |= {method: {"chosen": rates[0]} for method, rates in protocol.rates.items() if method not in searched}
    if set(searched) <= set(kept):
        return {method: each["chosen"] for method, each in kept.items()}
    rows = min(protocol.rows, len(held_out.test_labels))
    strongest = [(CORRUPTIONS, protocol.severities[-1:])]
    test = Conditions(held_out, strongest, rows=rows, batch_size=protocol.test_batch, progress=False)
    for method in [method for method in searched if method not in kept]:
        state, every = nets(NETS[method]), rows // protocol.search_rows[method]
        errors = [
            float(np.mean(list(test.errors(config, protocol, method, rate, state, every=every).values())))
            for rate in protocol.rates[method]
        ]
        tried = dict(zip(map(str, protocol.rates[method]), errors, strict=True))
        kept[method] = {"chosen": protocol.rates[method][int(np.argmin(errors))], "tried": tried}
        write_json(path, kept)
    return {method: each["chosen"] for method, each in kept.items()}


def summary(
    found: dict[str, list[dict[str, Any]]], config: Config, noisy: list[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores of the ledger's rows, `[S]` each, by setting and method."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}

    def add(setting: str, method: str, names: list[str], which: int) -> None:
        runs = found[method]
        scores = [np.mean([run["errors"][name][which] for name in names]) for run in runs]
        cells[setting, method] = {"scores": np.array(scores), "seconds": [run["seconds"] for run in runs]}

    whole = [method for method in found if method != "ttt"]
    if config.dataset == "cifar10":
        for name in CORRUPTIONS:
            for method in found:
                if f"{name}/5" in found[method][0]["errors"]:
                    add(f"CIFAR-10-C, severity 5, {name}", method, [f"{name}/5"], 1)
        for method in whole:
            add("CIFAR-10-C, severity 5, mean of 15", method, [f"{name}/5" for name in CORRUPTIONS], 0)
        return cells
    for method in found:
        add("noise, equal rows", method, noisy, 1)
    for family, members in {**FAMILIES, "all 15": slice(None)}.items():
        for method in whole:
            names = [name for name in found[method][0]["errors"] if name.split("/")[0] in CORRUPTIONS[members]]
            add(family, method, names, 0)
    return cells


def _interval(scores: np.ndarray) -> str:
    s = statistics(scores)
    return f"95 % interval ± {T_975.get(s.n, 1.96) * s.sem:.2f}" if s.n > 1 else ""


def table(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Error in percent: mean and half of its 95 % interval over seeds."""
    settings, methods = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [f"{'error (%)':<36s}" + "".join(f"{method:>16s}" for method in methods)]
    for setting in settings:
        row = f"{setting:<36s}"
        for method in methods:
            if (setting, method) not in cells:
                row += f"{'':>16s}"
                continue
            s = statistics(cells[setting, method]["scores"])
            row += f"{s.mean:>9.2f} ± {T_975.get(s.n, 1.96) * s.sem:4.2f}" if s.n > 1 else f"{s.mean:>9.2f}       "
        lines.append(row)
    return "\n".join(lines)


def figure(found: dict[str, list[dict[str, Any]]], names: list[str], directory: Path) -> Path:
    """Mean error by corruption and severity, a panel for each method; what it did not answer is left white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    corruptions = list(dict.fromkeys(name.split("/")[0] for name in names))
    severities = sorted({int(name.split("/")[1]) for name in names})
    drawn, axes = plt.subplots(
        1, len(found), figsize=(2.2 + 1.7 * len(found), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    image = None
    for panel, (method, runs) in zip(axes[0], found.items(), strict=True):
        errors = np.full((len(corruptions), len(severities)), np.nan)
        for name in runs[0]["errors"]:
            corruption, severity = name.split("/")
            values = [next(v for v in run["errors"][name] if v is not None) for run in runs]
            errors[corruptions.index(corruption), severities.index(int(severity))] = np.mean(values)
        image = panel.imshow(errors, vmin=0, vmax=60, cmap="viridis_r", aspect="auto")
        panel.set_title(method, fontsize=9)
        panel.set_xticks(range(len(severities)), severities)
        panel.set_yticks(range(len(corruptions)), [name.replace("_", " ") for name in corruptions], fontsize=8)
        for (row, column), value in np.ndenumerate(errors):
            if np.isfinite(value):
                colour = "white" if value > 35 else "black"
                panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes[0, 0].set_ylabel("corruption")
    drawn.supxlabel("severity", fontsize=9)
    drawn.colorbar(image, ax=axes, label="error (%)", extend="max")
    path = directory / "errors.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
