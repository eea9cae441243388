"""A stream of language through the same machinery: killed and resumed runs, components that were not made for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from cl_zoo import Component, Learner, Stream, compose, ewc, fit, replay, run_stream, supervised, weight_interpolation
from cl_zoo.language import decoder
from cl_zoo.layers import ttt_linear
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import text_domains
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.training.run_directory import read_metrics
from tests.conftest import forget_programs
from tests.tiny import close, same_bytes

# Placed as what is read from a checkpoint is, so that a resumed run finds the programs of the first one compiled.
KEY = jax.device_put(jax.random.key(4), jax.devices()[0])
STEPS, ROWS = 6, 4


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Two domains that share no byte."""
    random = np.random.default_rng(0)
    texts = {
        name: b" ".join(bytes(random.choice(list(letters), 3).tolist()) for _ in range(150))
        for name, letters in (("lower", b"abcdef"), ("upper", b"UVWXYZ"))
    }
    sizes = {"sample_size": 8, "sample_batch": ROWS, "evaluation_batch": ROWS}
    return text_domains(texts, length=16, steps=STEPS, batch_size=ROWS, **sizes)


def language_learner(*components: Component) -> Learner:
    """Blocks of TTT-Linear, four mini-batches in a row."""
    net = decoder(256, [(ttt_linear(8, 2, mini_batch=4), 16, 1)])
    return compose(net.model, optax.adam(1e-2), supervised(next_token_loss), *components)


@pytest.fixture(scope="module")
def subject(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """All at once, and a run of it that nothing interrupted."""
    averaged = weight_interpolation(0.25, alignment=None)
    learner = language_learner(replay(100, batch_size=ROWS), averaged, ewc(10.0, labels="loss"))
    directory = tmp_path_factory.mktemp("language")
    once = fit(learner, stream, KEY, directory / "once", checkpoint_every=3, checkpoint_seconds=0, progress=False)
    yield SimpleNamespace(learner=learner, directory=directory, once=once)
    forget_programs()


def test_run_stopped_in_the_middle_of_a_domain_ends_in_the_same_bytes(
    subject: SimpleNamespace, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume() -> Any:
        where = subject.directory / "stopped"
        return fit(subject.learner, stream, KEY, where, checkpoint_every=3, checkpoint_seconds=0, progress=False)

    save = Checkpoints.save
    # Within the first domain and within the second; both times what came after the last checkpoint is lost.
    for last in (3, STEPS + 3):

        def die(self: Any, step: int, tree: Any, last: int = last) -> None:
            if step == last:
                raise SystemExit("killed")
            save(self, step, tree)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", die)
            with pytest.raises(SystemExit):
                resume()
    same_bytes(resume(), subject.once)
    for file in ("metrics.csv", "accuracy.npy"):
        one, other = (subject.directory / name / file for name in ("stopped", "once"))
        assert one.read_bytes() == other.read_bytes()


def test_fit_equals_one_compiled_program(subject: SimpleNamespace, stream: Stream) -> None:
    whole = run_stream(subject.learner, stream, KEY)
    # Adam's first steps divide by what is nearly 0, where rounding shows.
    close(whole.state.params, subject.once.state.params, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(whole.accuracy, subject.once.accuracy, atol=1e-3)
    for name in whole.metrics:
        np.testing.assert_allclose(whole.metrics[name], subject.once.metrics[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_components_act_on_a_decoder_as_on_any_model(subject: SimpleNamespace) -> None:
    state, metrics = subject.once.state, read_metrics(subject.directory / "once")
    steps, penalty = metrics["ewc/penalty"]
    assert steps.tolist() == list(range(2 * STEPS))
    penalty = penalty.reshape(2, STEPS)
    assert not penalty[0].any() and (penalty[1, 1:] > 0).all()
    leaves = jax.tree_util.tree_leaves_with_path(state.parts["ewc"].precision)
    for path, precision in leaves:  # also of the layer's inner learning: its first fast weights, its rates
        assert (np.asarray(precision) >= 0).all() and np.asarray(precision).max() > 0, jax.tree_util.keystr(path)
    memory = state.parts["replay"]
    assert int(memory.seen) == 2 * STEPS * ROWS
    kept = np.asarray(memory.rows[0])[: 2 * STEPS * ROWS]
    assert (kept > 0).all() and {bytes([b]) for b in np.unique(kept)} <= {bytes([b]) for b in b"abcdefUVWXYZ "}
    assert {row.tobytes().decode("latin1").replace(" ", "").islower() for row in kept.astype(np.uint8)} == {True, False}
    averaged = state.parts["weight_interpolation"]
    assert int(averaged.finished) == 2 and float(averaged.distance) > 0.1
    same_bytes(averaged.params, state.params)  # the next task's old model


@pytest.mark.parametrize("alignment", ["activations", "weights"])
def test_alignment_of_a_decoder_is_refused(stream: Stream, alignment: str, tmp_path: Path) -> None:
    learner = language_learner(weight_interpolation(0.5, alignment=alignment))
    with pytest.raises(ValueError, match=f"alignment is '{alignment}', but the model names no hidden units"):
        fit(learner, stream, KEY, tmp_path, progress=False)
