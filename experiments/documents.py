"""Documents longer than the window of attention: does learning along them keep what has left it?

Command                                                   hardware       time       expected
python -m experiments.documents --record                  2 CPU cores               not run yet

Every document has a dictionary of its own: words that are each followed by their value, the same one all through the
document. Decoders of four blocks of width 64 see the last 32 tokens, 16 words; a word that came before them is known
only to who kept it. The last block has a second feed-forward network ("prime"):

    none                  the decoder as it was trained
    dynamic evaluation    the same, whose prime network takes a step of gradient descent after every 16 tokens
    ttt-e2e               trained through such steps, from weights to learn from
    ttt-e2e, rate 0       its weights, without the steps
    attention             attention to the whole document in all blocks, no steps

All are trained on the same documents, by Adam, for as many updates. Rates are the best by validation with seed 100,
that of dynamic evaluation too. Scores are nats per value above the least that anybody can expect who remembers the
document, at values beyond the window alone.

Published (Tandon et al. 2025, arXiv 2512.23675; 3B parameters, 128 000 tokens of books): the loss of ttt-e2e goes on
falling with context as that of full attention does, that of the window does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import tyro

from cl_zoo import Batch, Stream
from cl_zoo.language import Decoder, decoder
from cl_zoo.layers import softmax_attention, window_attention
from cl_zoo.losses import token_losses
from cl_zoo.streams import best_dictionary_scores, fresh_dictionaries
from experiments.common import all_but, check_numbers
from experiments.learning_along import METHODS, Problem, run_study


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    methods: tuple[str, ...] = METHODS
    seeds: int = 5
    steps: int = 1500
    batch_size: int = 16
    length: int = 256
    words: int = 32
    values: int = 16
    width: int = 64
    heads: int = 2
    window: int = 32
    chunk: int = 16
    """Tokens between two steps."""
    hidden: int = 96
    """Of the feed-forward networks."""
    prime: int = 96
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Of Adam, each tried."""
    inner_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Of the steps along a document, each tried."""
    directory: str = "runs/documents"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def problem_of(config: Config) -> Problem:
    """Documents, for decoders of four blocks."""
    setting = f"{config.length} tokens, window {config.window}"
    best, _ = best_dictionary_scores(config.length, config.words, config.values)

    def stream(setting: str) -> Stream:
        sizes: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "length": config.length}
        return fresh_dictionaries(words=config.words, values=config.values, **sizes)

    def above_best(setting: str, stream: Stream, batch: Batch, outputs: Any) -> Any:
        return (token_losses(outputs, batch.y)[:, ::2] - jnp.asarray(best))[:, config.window // 2 :]

    def net(method: str) -> Decoder:
        options: dict[str, Any] = {"convolution": 4, "qk_norm": True}
        window = {"window": config.window} if method != "attention" else {}
        mixer = (window_attention if window else softmax_attention)(config.width, config.heads, **options, **window)
        last = {"mixer": mixer, "prime": config.prime, "ffn": config.hidden}
        return decoder(config.words + config.values, [(mixer, config.hidden, 3), (last, 1)], sandwich=True)

    return Problem((setting,), setting, stream, above_best, net, {"prime": config.chunk}, clip=1.0)


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "batch_size", "chunk", "window")
    benchmark = "Documents longer than the window: nats per value above the best possible, not percent"
    run_study("documents", config, problem_of(config), benchmark, all_but(config, "methods"), "value beyond the window")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
