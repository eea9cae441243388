"""Tables of bigrams that switch: does end-to-end test-time training follow what keeps changing along a sequence?

Command                                                   hardware       time       expected
python -m experiments.switching_bigrams --record          2 CPU cores    28 min     64 tokens a segment: ttt-e2e 0.22,
                                                                                    attention 0.24, dynamic evaluation
                                                                                    0.98, none 1.29

Every M tokens another one of eight tables of bigrams holds, which none of the tokens tells. Nets of two blocks of width
32 without attention see one token at a time; what they know of the table that holds must be in their weights:

    none                  the net as it was trained
    dynamic evaluation    the same net, whose feed-forward weights take a step of gradient descent after every token
    ttt-e2e               trained through such steps, from weights to learn from
    ttt-e2e, rate 0       its weights, without the steps
    attention             softmax attention in both blocks, no steps

beside the Bayes-optimal loss of who knows all tables and where segments begin. All are trained on the same sequences of
64 tokens, by Adam, for as many updates. Rates are the best by validation with seed 100 at 16 tokens a segment, that of
dynamic evaluation too. Scores are nats per token above the best.

Published with real text in place of tables (Tandon et al. 2025, arXiv 2512.23675, figure 2, two blocks of width 384 at
128 tokens, curves alone): ttt-e2e below attention, below dynamic evaluation, below none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tyro

from cl_zoo import Batch, Stream
from cl_zoo.language import Decoder, decoder
from cl_zoo.layers import softmax_attention, swiglu
from cl_zoo.losses import token_losses
from cl_zoo.streams import best_bigram_losses, switching_bigrams
from experiments.common import all_but, check_numbers
from experiments.learning_along import METHODS, Problem, run_study


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    segments: tuple[int, ...] = (4, 8, 16, 64)
    """M."""
    methods: tuple[str, ...] = METHODS
    seeds: int = 5
    steps: int = 500
    batch_size: int = 8
    length: int = 64
    vocabulary: int = 32
    tables: int = 8
    width: int = 32
    hidden: int = 64
    """Of the feed-forward networks."""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Of Adam, each tried."""
    inner_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Of the steps along a sequence, each tried."""
    directory: str = "runs/switching_bigrams"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def problem_of(config: Config) -> Problem:
    """Tables that switch after M tokens, for nets of two blocks."""
    named = {f"{segment} tokens a segment": segment for segment in config.segments}
    choosing = "16 tokens a segment"
    lengths = named | {choosing: 16}

    def stream(setting: str) -> Stream:
        sizes: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "length": config.length}
        sizes |= {"vocabulary": config.vocabulary, "tables": config.tables}
        return switching_bigrams(segment=lengths[setting], **sizes)

    def above_best(setting: str, stream: Stream, batch: Batch, outputs: Any) -> Any:
        best = best_bigram_losses(stream.data, batch.x, batch.y, segment=lengths[setting])
        return token_losses(outputs, batch.y) - best

    def net(method: str) -> Decoder:
        if method == "attention":
            return decoder(config.vocabulary, [(softmax_attention(config.width, 2), config.hidden, 2)])
        return decoder(config.vocabulary, [({"ffn": swiglu(config.width, config.hidden)}, 2)])

    # Not clipped, as in the public script.
    return Problem(tuple(named), choosing, stream, above_best, net, {"ffn": 1}, clip=1e9)


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "batch_size")
    benchmark = "Tables of bigrams that switch: nats per token above the Bayes-optimal loss, not percent"
    settled = all_but(config, "segments", "methods")
    run_study("switching_bigrams", config, problem_of(config), benchmark, settled)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
