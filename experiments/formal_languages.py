"""Formal languages: which sequence layers keep a parity, count modulo a number, or count up and down?

Command                                                   hardware       time       expected
python -m experiments.formal_languages --record           2 CPU cores               not run yet

Decoders of two blocks of width 32 with 2 heads learn strings of at most 40 symbols, and at each of their places what
may come next. A string counts as right if all its places are. Two bins of other strings are tested: as long as those of
training, and of 41 to 256 symbols. All layers are trained alike: Adam, the same strings, as many updates, a rate that
is the best of two by validation on parity with seed 100.

Published (Behrouz et al. 2025, arXiv 2512.24695, table 5; lengths, sizes and training are not known, so its order alone
can be compared; shorter / longer strings): parity Transformer 46.4 / 0, linear attention 78.1 / 0, DeltaNet 98.2 /
10.1, HOPE 100 / 100; (aa)* and (abab)* 0 / 0 for the first three, 100 / 100 for HOPE; a^n b^n, a^n b^n c^n and
shuffle-2 100 / 100 for all.

A linear memory M can keep a parity only if what it answers to a key can change its sign: if its transition from token
to token has a negative eigenvalue along that key. Of the delta rule that is 1 - beta, of self-modifying Titans with one
layer alpha - eta, twice or three times eta by its objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cl_zoo import Learner, Stream, TrainState, at, compose, supervised, sweep
from cl_zoo.language import decoder
from cl_zoo.layers import (
    Mixer,
    cms,
    delta_rule,
    gated_delta_rule,
    linear_attention,
    self_modifying_titans,
    softmax_attention,
    titans,
    ttt_linear,
)
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import formal_language
from cl_zoo.streams.sequences import Language
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_names,
    check_numbers,
    drawing,
    kept,
    study,
    warmed_up_adam,
)

LAYERS: dict[str, Callable[..., Mixer]] = {
    "softmax attention": softmax_attention,
    "linear attention": linear_attention,
    "delta rule": delta_rule,
    "delta rule, rate to 2": partial(delta_rule, base_rate=2.0),
    "gated delta rule": gated_delta_rule,
    "ttt-linear": partial(ttt_linear, mini_batch=1),
    "titans": partial(titans, chunk=1, base_rate=0.1),
    "hope": partial(self_modifying_titans, chunk=1),
    "hope, rate to 2": partial(self_modifying_titans, chunk=1, base_rate=2.0),
    "hope, half l2": partial(self_modifying_titans, chunk=1, objective="half l2"),
}
LANGUAGES = get_args(Language)
CHOOSING = 100
"""The seed by which rates are chosen."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    languages: tuple[str, ...] = LANGUAGES
    layers: tuple[str, ...] = tuple(LAYERS)
    seeds: int = 5
    steps: int = 600
    batch_size: int = 32
    longest: int = 40
    """Symbols in training."""
    tested: int = 256
    """Symbols in the second bin, at most."""
    strings: int = 100
    """Of each test."""
    width: int = 32
    heads: int = 2
    blocks: int = 2
    hidden: int = 64
    """Of the SwiGLU networks; HOPE has a chain of two networks in their place."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Of Adam, each tried."""
    directory: str = "runs/formal_languages"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def streams_of(config: Config, language: str) -> tuple[Stream, Stream]:
    """The strings of training, and longer ones."""
    sizes: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "evaluation_batch": 50}
    sizes |= {"evaluation_size": config.strings}
    short = formal_language(language, longest=config.longest, **sizes)  # type: ignore[arg-type]
    return short, formal_language(language, shortest=config.longest + 1, longest=config.tested, **sizes)  # type: ignore[arg-type]


def learner_of(config: Config, layer: str, outputs: int, rate: Any) -> Learner:
    """A decoder with that layer in every block."""
    mixer = LAYERS[layer](config.width, config.heads)
    ffn = cms(config.width, config.hidden, levels=2) if layer.startswith("hope") else config.hidden
    model = decoder(outputs, [(mixer, ffn, config.blocks)]).model
    return compose(model, warmed_up_adam(rate, config.steps), supervised(next_token_loss))


def trained(config: Config, language: str, layer: str, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """Scores `[H, S]` of strings as long as those of training, by "validation" and "test", and of "longer" ones."""
    short, longer = streams_of(config, language)

    def scores(learner: Learner, state: TrainState, stream: Stream, key: Any) -> dict[str, Any]:
        agent = learner.agent(state)
        found = {split: short.mean_score(agent, short.evaluation(0, split)) for split in ("validation", "test")}
        return found | {"longer": longer.mean_score(agent, longer.evaluation(0, "test"))}

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    make = partial(learner_of, config, layer, short.tasks.active.shape[-1])
    options: dict[str, Any] = {"measure": {"scores": at("end", scores)}, "metrics": ["loss"], "progress": False}
    options["batch_size"] = len(rates) * len(seeds)  # many small operations: all at once
    result = sweep(make, jnp.array(rates), short, keys, **options)
    loss = result.metrics["loss"][..., -1, -1]
    return jax.tree.map(np.asarray, dict(result.measures["scores"]) | {"loss": loss})


def chosen(config: Config, layer: str, folder: Path) -> float:
    """The best rate by validation on parity; kept once found."""

    def tried() -> dict[str, Any]:
        found = trained(config, "parity", layer, config.rates, [CHOOSING])
        # Of equal scores, the lower loss.
        score = found["validation"][:, 0] - 1e-3 * np.nan_to_num(found["loss"][:, 0], nan=1e3)
        return {"rates": list(config.rates), "score": np.nan_to_num(score, nan=-1.0).tolist()}

    found = kept(folder / "chosen" / f"{layer}.json".replace(" ", "_"), tried)
    return found["rates"][int(np.argmax(found["score"]))]


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds", "steps", "batch_size", "strings", "longest")
    check_names(config, languages=LANGUAGES, layers=LAYERS)
    notes: dict[tuple[str, str], str] = {}

    def cells(directory: Path) -> list[Cell]:
        """All seeds of a layer at once."""
        return [cell(directory, language, layer) for language in config.languages for layer in config.layers]

    def cell(directory: Path, language: str, layer: str) -> Cell:
        def run(seeds: Sequence[int]) -> dict[str, Any]:
            rate = chosen(config, layer, directory)
            found = trained(config, language, layer, [rate], seeds)
            return {"rate": [rate] * len(seeds)} | {name: values[0].tolist() for name, values in found.items()}

        return Cell(language, layer, f"{language}-{layer}", run, config.seeds)

    def report(found: Found) -> Report:
        for (language, layer), one in found.items():
            for said in ("", ", longer"):
                notes[language + said, layer] = f"rate {float(np.ravel(one['rate'])[0]):g}"
        return told(config, notes, found)

    settled = all_but(config, "languages", "layers")
    study("formal_languages", config, cells, report, partial(figures, config), settled=settled)


def told(config: Config, notes: dict[tuple[str, str], str], found: Found) -> Report:
    """Percent of strings that are right, of both bins."""
    lines = [f"\n{'right, % (longer)':24s}" + "".join(f"{language:>18s}" for language in config.languages)]
    for layer in config.layers:
        row = f"{layer:24s}"
        for language in config.languages:
            short, longer = (100 * found[language, layer][name].mean() for name in ("test", "longer"))
            row += f"{f'{short:.1f} ({longer:.1f})':>18s}"
        lines.append(row)
    rows: Found = {}
    for name, said in (("test", ""), ("longer", ", longer")):
        for (language, layer), cell in found.items():
            rows[language + said, layer] = {"scores": 100 * cell[name], "seconds": cell["seconds"]}
    benchmark = (
        f"Formal languages: strings right at every place, up to {config.longest} symbols (longer: {config.tested})"
    )
    return Report("\n".join(lines), benchmark, rows, notes)


def figures(config: Config, found: Found, directory: Path) -> list[Path]:
    """Both bins of every language and layer, as two maps."""
    path = directory / "right.png"
    n = len(next(iter(found.values()))["seconds"])
    with drawing(path, 1, 2, size=(4.6, 4.2)) as ((left, right),):
        both = (left, "test", f"at most {config.longest} symbols"), (right, "longer", "longer strings")
        for axes, name, title in both:
            values = [[100 * found[a, b][name].mean() for a in config.languages] for b in config.layers]
            axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    shade = "black" if value > 60 else "white"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=7)
            axes.set_xticks(range(len(config.languages)), config.languages, rotation=45, ha="right", fontsize=8)
            axes.set_yticks(range(len(config.layers)), config.layers if axes is left else [], fontsize=8)
            axes.set_title(f"{title}: % right, mean of {n} seeds", fontsize=9)
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
