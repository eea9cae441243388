"""The laws that every algorithm of the catalogue keeps. To be registered is to be tested.

One program for each entry makes everything that its laws look at: whole runs as lanes of a `vmap` (half of its numbers
and another key, its own numbers, its null setting where that is a number), and what batches, samples and test batches
full of padding change. So each entry compiles once, and its laws only compare arrays.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cl_zoo import Batch, Component, Learner, Stream, fit, run_stream, supervised, sweep
from cl_zoo.entries import Entry
from cl_zoo.streams import permuted_mnist
from cl_zoo.training import loop
from cl_zoo.training.checkpoint import Checkpoints
from tests.conftest import forget_programs
from tests.contract.cases import SUBJECTS, case
from tests.tiny import (
    BATCH,
    STEPS,
    close,
    entry_components,
    entry_learner,
    in_bfloat16,
    kinds,
    naive_component,
    raw,
    same_bytes,
    tiny_learner,
    tiny_stream,
)

KEY, OTHER_KEY = jax.random.key(3), jax.random.key(8)
CONSTANT = {"l2_init", "context_distillation", "offline_distillation"}  # what they keep are the first parameters
OPTIMISERS = {False: optax.adam(1e-2), True: optax.sgd(0.1)}
HALF, OWN, NULL = range(3)
"""Lanes: half of the numbers and another key; the entry as it stands; its null setting, if numbers alone make it."""
COVER = ("agem", "packnet", "icarl", "ttt", "maml", "sdft", "together")
"""Entries that have, together, every hook and every kind of state."""


def hooks(component: Component) -> set[str]:
    """Names of those that it has."""
    return {field for field, hook in component._asdict().items() if callable(hook)}


def numeric_null(entry: Entry) -> bool:
    """Whether only numbers that may be traced make the null setting, under the optimiser of all lanes."""
    null = entry.null
    return null is not None and not null.sgd and set(null.arguments) <= set(entry.numbers)


def settings(entry: Entry) -> dict[str, Any]:
    """The numbers of each lane, `{name: f32[3]}`."""
    null = entry.null.arguments if entry.null and numeric_null(entry) else {}
    lanes = {
        name: [0.5 * entry.arguments[name], entry.arguments[name], null.get(name, entry.arguments[name])]
        for name in entry.numbers
    }
    return {name: jnp.array(values, jnp.float32) for name, values in lanes.items()} or {"nothing": jnp.zeros(3)}


def spoil(batch: Batch, rows: Any) -> Batch:
    """Examples of weight 0, full of what must not matter."""

    def put(tree: Any, value: int) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.where(rows.reshape((-1,) + (1,) * (leaf.ndim - 1)), jnp.array(value, leaf.dtype), leaf),
            tree,
        )

    return Batch(put(batch.x, 255), put(batch.y, 77), put(batch.task, 99), put(batch.weight, 0))


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(learner: Learner, stream: Stream, key: Any) -> dict[str, Any]:
    """A whole run, step by step, and what its laws need beside it."""
    learner, carry = loop.start(learner, stream, key)

    def task(carry: Any, t: Any) -> Any:
        state = loop.begin(learner, stream, key, carry[0], t)
        carry, metrics = jax.lax.scan(
            lambda carry, _: loop.update(learner, stream, carry), (state, carry[1]), length=STEPS
        )
        carry = loop.finish(learner, stream, key, carry[0], t), carry[1]
        return carry, (carry[0], metrics)

    first = carry[0]
    (last, cursor), (states, metrics) = jax.lax.scan(task, carry, jnp.arange(stream.n_tasks))
    one, two = (jax.tree.map(lambda leaf, t=t: leaf[t], states) for t in (0, 1))
    batch, _ = stream.next(cursor, learner.agent(last))
    rows = jnp.arange(BATCH) >= 5
    absent = batch._replace(weight=jnp.where(rows, 0.0, 1.0))
    padding = spoil(batch, jnp.full(BATCH, True))
    batches = stacked(batch, spoil(batch, rows), absent, padding)

    sample = stream.sample(0, key)
    late = jnp.arange(sample.weight.shape[1]) >= 15
    absent_sample = sample._replace(weight=jnp.where(late, 0.0, sample.weight))
    spoilt_sample = jax.vmap(lambda batch: spoil(batch, late))(sample)._replace(weight=absent_sample.weight)

    found = {
        "states": jax.tree.map(lambda one, all_: jnp.concatenate([one[None], all_]), first, states),
        "metrics": metrics,
        "batch": batch,
        "updated": jax.lax.map(lambda batch: learner.update(two, batch), batches),
        "ended": jax.lax.map(lambda sample: learner.end_task(one, sample), stacked(spoilt_sample, absent_sample)),
        "outputs": learner.predict(last, batch.x, batch.task),
    }
    if batch.task is not None and isinstance(batch.x, jax.Array):
        told = jnp.arange(BATCH, dtype=jnp.int32) % stream.n_tasks
        found["told"] = learner.predict(last, batch.x, told)
    if any(component.adapt for component in learner.components):
        unlabelled = batch._replace(y=jax.tree.map(jnp.zeros_like, batch.y))
        tests = stacked(batch, unlabelled, spoil(batch, rows), absent, padding)
        found["adapted"] = jax.lax.map(lambda batch: learner.adapt(two, batch), tests)
        found["before"] = learner.predict(two, batch.x, batch.task)
    return found


def on_host(tree: Any) -> Any:
    """NumPy's arrays, of which a slice is no program; keys stay."""

    def host(leaf: Any) -> Any:
        return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)

    return jax.tree.map(host, tree)


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest, tiny_images: Any) -> Iterator[SimpleNamespace]:
    """One entry, and all that its laws look at."""
    entry = SUBJECTS[request.param]
    stream = tiny_stream(tiny_images, entry.scenarios[0])

    def run(numbers: Any, key: Any, stream: Stream) -> Any:
        return lane(entry_learner(stream, entry, **{name: numbers[name] for name in entry.numbers}), stream, key)

    keys = jnp.stack([OTHER_KEY, KEY, KEY])
    lanes = on_host(jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(settings(entry), keys, stream))
    own = jax.tree.map(lambda leaf: leaf[OWN], lanes)

    def at(t: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[t]), own["states"])

    yield SimpleNamespace(
        entry=entry,
        stream=stream,
        learner=entry_learner(stream, entry),
        lanes=lanes,
        own=own,
        states=[at(t) for t in range(stream.n_tasks + 1)],
    )
    forget_programs()


@pytest.fixture(scope="module")
def naive(tiny_images: Any) -> Callable[..., Any]:
    """What the naive learner makes of the same run in a scenario, under Adam or under SGD, with the entry's network."""

    @functools.cache
    def run(scenario: str, sgd: bool, net: Callable[..., Any]) -> Any:
        stream = tiny_stream(tiny_images, scenario)
        learner = tiny_learner(stream, naive_component(scenario), optimiser=OPTIMISERS[sgd], net=net)
        return run_stream(learner, stream, KEY)

    return run


def each(tree: Any, i: int) -> Any:
    """The i-th variant of what was stacked."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_every_transition_keeps_the_kind_of_the_state(subject: SimpleNamespace) -> None:
    """So the second update needs no new trace, and the whole stream is a scan."""
    learner, stream = subject.learner, subject.stream
    learner, (state, _) = jax.eval_shape(loop.start, learner, stream, KEY)
    wanted, batch = kinds(state), jax.eval_shape(lambda: subject.own["batch"])
    sample = jax.eval_shape(lambda stream: stream.sample(0, KEY), stream)
    task = jax.eval_shape(lambda stream: jax.tree.map(lambda leaf: leaf[0], stream.tasks), stream)
    for transition, arguments in (
        (lambda learner, *rest: learner.begin_task(*rest), (task, sample)),
        (lambda learner, *rest: learner.update(*rest)[0], (batch,)),
        (lambda learner, *rest: learner.end_task(*rest), (sample,)),
        (lambda learner, *rest: learner.adapt(*rest)[0], (batch,)),
    ):
        assert kinds(jax.eval_shape(transition, learner, state, *arguments)) == wanted


def test_numbers_and_seeds_are_lanes_of_one_program(subject: SimpleNamespace) -> None:
    """Two seeds differ in what is learnt within tasks, or in what is kept where nothing is."""
    told = (subject.lanes["metrics"], subject.lanes["states"].parts)
    leaves = [raw(leaf).astype(float) for leaf in jax.tree.leaves(told)]
    assert max(np.abs(leaf[HALF] - leaf[OWN]).max() for leaf in leaves) > 1e-3
    assert all(np.isfinite(leaf[HALF]).all() for leaf in leaves)


def test_absent_examples_change_nothing(subject: SimpleNamespace) -> None:
    _, spoilt, absent, _ = (each(subject.own["updated"], i) for i in range(4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(spoilt[1]))
    same_bytes(spoilt, absent)


def test_not_even_nan_in_absent_examples(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised())
    batch = Batch(jnp.full((BATCH, 4, 4), jnp.nan).at[:3].set(0.5), jnp.zeros(BATCH, int), jnp.zeros(BATCH, int),
                  (jnp.arange(BATCH) < 3).astype(jnp.float32))  # fmt: skip
    state = learner.init(KEY, batch)
    state, metrics = jax.jit(learner.update)(state, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)))


def test_batch_of_padding_leaves_all_but_step(subject: SimpleNamespace) -> None:
    state, (after, metrics) = subject.states[2], each(subject.own["updated"], 3)
    same_bytes(after._replace(step=state.step), state)
    assert int(after.step) == int(state.step) + 1
    assert all(np.isfinite(value) for value in metrics.values())


def test_absent_examples_of_a_sample_change_nothing(subject: SimpleNamespace) -> None:
    spoilt, absent = (each(subject.own["ended"], i) for i in range(2))
    same_bytes(spoilt, absent)


def network(state: Any) -> Any:
    """The parameters of the network itself, without learned rates."""
    return state.params.get("params", state.params)


def layer(state: Any, name: str) -> Any:
    """A layer's kernel; of a decoder, its embedding."""
    params = network(state)
    return params["embedding"] if "embedding" in params else params[name]["kernel"]


def test_null_setting_equals_naive(subject: SimpleNamespace, naive: Callable[..., Any]) -> None:
    null, entry = subject.entry.null, subject.entry
    if null is None:
        pytest.skip("it has no null setting")
    wanted = naive(entry.scenarios[0], null.sgd, case(entry.name).net)
    if numeric_null(entry):
        state = jax.tree.map(lambda leaf: leaf[NULL, -1], subject.lanes["states"])
    else:
        nulled = entry_learner(subject.stream, entry, OPTIMISERS[null.sgd], **null.arguments)
        result = run_stream(nulled, subject.stream, KEY)
        state = result.state
        np.testing.assert_allclose(result.accuracy, wanted.accuracy, atol=1e-6)
    close(network(state), network(wanted.state), rtol=1e-4, atol=1e-5)


def at_test_time(entry: Entry) -> list[str]:
    """Those of an entry's components that keep what they learn from test batches, whatever else they do."""
    return [component.name for component in entry_components(entry) if component.adapt and component.init]


def test_what_learns_at_test_time_moves_then_and_not_by_padding(subject: SimpleNamespace) -> None:
    """It learns without labels; from examples of weight 0 it learns nothing."""
    if not at_test_time(subject.entry):
        pytest.skip("it keeps nothing of test batches")
    plain, unlabelled, spoilt, absent, padding = (each(subject.own["adapted"], i) for i in range(5))
    state, (after, outputs) = subject.states[2], plain
    for name in at_test_time(subject.entry):
        pairs = zip(jax.tree.leaves(state.parts[name]), jax.tree.leaves(after.parts[name]), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)
    moved = zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True)
    assert max(np.abs(a - b).max() for a, b in moved) > 1e-4
    before = subject.own["before"]
    assert outputs.shape == before.shape and np.abs(outputs - before).max() > 1e-4
    same_bytes(unlabelled, plain)
    same_bytes((spoilt[0], spoilt[1][:5]), (absent[0], absent[1][:5]))
    same_bytes(padding[0], state)


def test_it_moves_what_it_should(subject: SimpleNamespace) -> None:
    first, *_, last = subject.states
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.params, last.parts, last.opt_state)))
    kernels = [layer(state, "output") for state in (first, last)]
    assert np.allclose(*kernels) != subject.entry.trains
    kept = first.parts.keys() - CONSTANT - set(at_test_time(subject.entry))
    for name, t in itertools.product(kept, range(subject.stream.n_tasks)):
        before, after = (jax.tree.leaves(state.parts[name]) for state in subject.states[t : t + 2])
        changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert any(changed), f"{name} kept nothing of task {t}"
    for metric in ("ewc/penalty", "synaptic_intelligence/penalty", "mas/penalty", "lwf/loss"):
        if metric in subject.own["metrics"]:
            values = np.asarray(subject.own["metrics"][metric])
            assert values[0].max() == 0, f"{metric} on the first task"
            assert values[1].max() > 0, f"{metric} on the second task"


def test_it_is_not_naive(subject: SimpleNamespace, naive: Callable[..., Any]) -> None:
    """Beyond its null setting, it changes what is learnt, or what is predicted."""
    if subject.entry.name == "supervised":
        pytest.skip("it is the naive learner")
    net = case(subject.entry.name).net
    wanted = naive(subject.entry.scenarios[0], False, net).state
    batch, components = subject.own["batch"], entry_components(subject.entry)
    added = [component for component in components if component.name != "supervised"]
    if all(hooks(component) <= {"init", "adapt"} for component in added):
        outputs = subject.learner.adapt(wanted._replace(parts=subject.states[-1].parts), batch)[1]
        assert np.abs(outputs - subject.learner.predict(wanted, batch.x, batch.task)).max() > 1e-4
    elif any(component.predict for component in components):
        other = tiny_learner(subject.stream, naive_component(subject.entry.scenarios[0]), net=net)
        assert np.abs(subject.own["outputs"] - other.predict(wanted, batch.x, batch.task)).max() > 1e-4
    else:
        kernels = [layer(state, "hidden_0") for state in (wanted, subject.states[-1])]
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_told_examples_are_answered_within_their_task(subject: SimpleNamespace) -> None:
    if "told" not in subject.own:
        pytest.skip("its examples tell no task")
    active = np.asarray(subject.stream.tasks.active)[np.arange(BATCH) % subject.stream.n_tasks]
    outputs = np.asarray(subject.own["told"])
    assert active[np.arange(BATCH), outputs.argmax(-1)].all()
    assert (np.where(active, -np.inf, outputs).max(-1) < np.where(active, outputs, np.inf).min(-1)).all()


COPIES = {
    *("tent", "lwf", "wise_ft", "fisher_merging", "weight_interpolation", "icarl", "l2_init", "der", "packnet", "sdft")
}
"""Entries of which a part holds parameters or outputs as they were, in their own type: nothing is summed there."""


def test_accumulators_are_float32_under_bfloat16(subject: SimpleNamespace) -> None:
    """0.999 a + 0.001 b is a in bfloat16, and a sum of a thousand small numbers stops growing."""
    learner = entry_learner(subject.stream, subject.entry, around=in_bfloat16)

    def run(learner: Learner, stream: Stream) -> Any:
        learner, carry = loop.start(learner, stream, KEY)
        after, _ = loop.update(learner, stream, carry)
        return carry[0], after[0], loop.finish(learner, stream, KEY, after[0], jnp.int32(0))

    first, *others = jax.eval_shape(run, learner, subject.stream)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(first.params)) or not first.params
    for other in others:
        assert kinds(other) == kinds(first)
    if subject.entry.name not in COPIES | {"together", "context_distillation", "offline_distillation"}:
        assert not [leaf for leaf in jax.tree.leaves(first.parts) if leaf.dtype == jnp.bfloat16]


def test_metrics_are_scalars(subject: SimpleNamespace) -> None:
    for name, values in subject.own["metrics"].items():
        assert values.shape == (subject.stream.n_tasks, STEPS) and values.dtype == jnp.float32, name


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_it_fits_its_other_scenarios(subject: SimpleNamespace, tiny_images: Any, scenario: str) -> None:
    """All by their shapes, one entry of three by a run."""
    if scenario not in subject.entry.scenarios[1:]:
        pytest.skip("not one of its other scenarios")
    stream = tiny_stream(tiny_images, scenario)
    learner = entry_learner(stream, subject.entry)
    if list(SUBJECTS).index(subject.entry.name) % 3 != ("domain", "class").index(scenario):
        shapes = jax.eval_shape(lambda learner, stream: run_stream(learner, stream, KEY), learner, stream)
        assert shapes.accuracy.shape == (4, 3)
        return
    result = run_stream(learner, stream, KEY)
    assert result.accuracy.shape == (4, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result.metrics, result.state.params)))


def test_state_does_not_grow_with_tasks(subject: SimpleNamespace, tiny_images: Any) -> None:
    if subject.entry.scenarios == ("skills",):
        pytest.skip("its network reads no images; what it keeps is a copy of the parameters")

    def size(n_tasks: int) -> int:
        stream = permuted_mnist(n_tasks, images=tiny_images, batch_size=BATCH, steps=STEPS)
        learner = entry_learner(stream, subject.entry)
        state = jax.eval_shape(lambda learner, stream: loop.start(learner, stream, KEY)[1][0], learner, stream)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.parts))

    assert size(2) == size(7)


# What costs more programs, on entries that have every hook and every kind of state.


@pytest.fixture(scope="module")
def covering(subject: SimpleNamespace) -> SimpleNamespace:
    if subject.entry.name not in COVER:
        pytest.skip("others have its hooks")
    return subject


@pytest.fixture(scope="module")
def whole(covering: SimpleNamespace) -> Any:
    """The same run as one compiled program."""
    return run_stream(covering.learner, covering.stream, KEY)


def test_every_hook_is_covered() -> None:
    covered = set().union(*(hooks(c) for name in COVER for c in entry_components(SUBJECTS[name])))
    everything = set().union(*(hooks(c) for entry in SUBJECTS.values() for c in entry_components(entry)))
    assert everything - covered == set(), "add an entry that has it to COVER"


def test_scan_and_vmap_equal_a_single_run(covering: SimpleNamespace, whole: Any) -> None:
    close(whole.state, covering.states[-1], rtol=1e-4, atol=1e-5)
    for name in whole.metrics:
        np.testing.assert_allclose(whole.metrics[name], covering.own["metrics"][name], rtol=1e-3, atol=1e-5)


def test_jit_equals_eager(covering: SimpleNamespace) -> None:
    found = covering.learner.update(covering.states[2], covering.own["batch"])
    close(found, each(covering.own["updated"], 0), rtol=1e-4, atol=1e-5)


def test_eight_devices_equal_one(covering: SimpleNamespace) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(covering.states[2], everywhere)
    batch = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), covering.own["batch"])
    assert BATCH % 8 == 0
    close(jax.jit(covering.learner.update)(state, batch), each(covering.own["updated"], 0), 1e-4, 1e-5)


def test_new_numbers_compile_nothing(covering: SimpleNamespace) -> None:
    entry = covering.entry
    if not entry.numbers:
        pytest.skip("it has no numbers")

    def make(settings: Any) -> Learner:
        return entry_learner(covering.stream, entry, **{name: settings[name] for name in entry.numbers})

    values = {name: jnp.array([0.5, 1.0]) * entry.arguments[name] for name in entry.numbers}
    keys = jnp.stack([OTHER_KEY, KEY])
    result = sweep(make, values, covering.stream, keys, batch_size=4)
    assert result.accuracy.shape == (2, 2, 4, 3)
    np.testing.assert_allclose(result.metrics["loss"][1, 1], covering.own["metrics"]["loss"], rtol=1e-3, atol=1e-4)
    from cl_zoo.training import _sweep

    before = _sweep._sweep_program.cache_info()
    sweep(make, jax.tree.map(lambda leaf: 0.7 * leaf, values), covering.stream, keys, batch_size=4)
    after = _sweep._sweep_program.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 1


def test_killed_and_resumed_run_ends_in_the_same_bytes(
    covering: SimpleNamespace, whole: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Any:
        return fit(
            covering.learner,
            covering.stream,
            KEY,
            tmp_path / name,
            checkpoint_every=3,
            checkpoint_seconds=0,
            progress=False,
        )

    once = run("once")
    with monkeypatch.context() as patch:
        # A kill in the middle of the second task, after metrics were written and before the checkpoint was.
        save = Checkpoints.save

        def die(self: Any, step: int, tree: Any) -> None:
            if step == STEPS + 3:
                raise SystemExit("killed")
            save(self, step, tree)

        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            run("stopped")
    resumed = run("stopped")
    same_bytes(resumed, once)
    for file in ("metrics.csv", "accuracy.npy"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    close(once.state, whole.state, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(once.accuracy, whole.accuracy, atol=1e-6)
