"""Sixty faults put into the source on purpose, and whether the tests of the entry they belong to find them.

    python -m tests.mutations [NAME ...] [--jobs 2]       about a minute each; writes tests/mutations.csv

Each row: a file, a text that occurs in it once, what it becomes, and the tests that must fail then (arguments of pytest,
`-k` chooses the entry). A copy of the project is changed, never the project itself. A fault that no test finds is a test
that is missing.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LAWS, ALGORITHMS = "tests/contract/test_laws.py", "tests/algorithms"


class Mutation(NamedTuple):
    """A fault: `old` in `cl_zoo/file` becomes `new`; pytest is run with `tests` and `-k where`."""

    name: str
    file: str
    old: str
    new: str
    where: str
    tests: tuple[str, ...] = (ALGORITHMS, LAWS)


MUTATIONS = (
    # Hooks of the algorithms: signs, missing terms, stale anchors, masks left out.
    Mutation("ewc without the half", "algorithms/ewc.py", "strength / 2 * quad", "strength * quad", "ewc"),
    Mutation("ewc keeps its first anchor", "algorithms/ewc.py", "quadratic(faded, state.params", "quadratic(faded, part.anchor", "ewc"),
    Mutation("ewc does not fade", "algorithms/ewc.py", "decay * old + new", "old + new", "ewc"),
    Mutation("si path has the wrong sign", "algorithms/synaptic_intelligence.py", "w - g * (new - old)", "w + g * (new - old)", "synaptic"),
    Mutation("si does not start its path anew", "algorithms/synaptic_intelligence.py", "SynapticIntelligenceState(zero,", "SynapticIntelligenceState(part.path,", "synaptic"),
    Mutation("mas without the factor two", "algorithms/mas.py", "return 2 * (outputs", "return 1 * (outputs", "mas"),
    Mutation("mas forgets older tasks", "algorithms/mas.py", "kept * o + added * n", "added * n", "mas"),
    Mutation("l2_init draws to the present", "algorithms/l2_init.py", "optax.tree.sub(params, part)", "optax.tree.sub(params, state.params)", "l2"),
    Mutation("lwf teacher never changes", "algorithms/lwf.py", "return state, LwfState(state.params, state.model_state)", "return state, part", "lwf"),
    Mutation("lwf temperature left out", "algorithms/lwf.py", "teacher, temperature, context", "teacher, 1.0, context", "lwf"),
    Mutation("replay of its own replays", "algorithms/replay.py", "batch_rows(record.batch), record.batch.weight", "batch_rows(record.prepared), record.prepared.weight", "replay"),
    Mutation("replay puts old examples first", "buffers.py", "jnp.concatenate([now, then])", "jnp.concatenate([then, now])", "replay"),
    Mutation("der compares with itself", "algorithms/der.py", "now[first] - then[first]", "now[first] - now[first]", "der"),
    Mutation("der draws once for both", "algorithms/der.py", "1 if beta is None else 2)]", "1 if beta is None else 2)[:1] * 2]", "der"),
    Mutation("agem projects every gradient", "estimators/projection.py", "jnp.where(dot < 0, ", "jnp.where(dot < jnp.inf, ", "agem"),
    Mutation("agem memory misses the last batch", "algorithms/agem.py", "(jnp.arange(sample.weight.shape[0]), sample))[0]", "(jnp.arange(sample.weight.shape[0] - 1), jax.tree.map(lambda v: v[:-1], sample)))[0]", "agem"),
    Mutation("icarl labels for old classes", "algorithms/icarl.py", "jnp.where(part.seen, jax.nn.sigmoid", "jnp.where(part.seen & False, jax.nn.sigmoid", "icarl"),
    Mutation("icarl keeps the first network", "algorithms/icarl.py", "part.task_size, state.params, state.model_state", "part.task_size, part.params, part.model_state", "icarl"),
    Mutation("gdumb trains on in place", "algorithms/gdumb.py", "state._replace(params=record.old_params)", "state", "gdumb"),
    Mutation("gdumb leaves out half of an epoch", "algorithms/gdumb.py", "epochs * per_epoch", "epochs * per_epoch // 2", "gdumb"),
    Mutation("slda means ignore the count", "algorithms/slda.py", "earlier = jnp.tril(own @ own.T, -1)", "earlier = jnp.tril(own @ own.T, 0)", "slda"),
    Mutation("slda without half the norm", "algorithms/slda.py", "part.means.T * weights, axis=0) / 2", "part.means.T * weights, axis=0)", "slda"),
    Mutation("weight interpolation the other way", "algorithms/weight_interpolation.py", "params = interpolate(state.params, old_params, old_weight)", "params = interpolate(old_params, state.params, old_weight)", "weight_interpolation or Interpolation or interpolation"),
    Mutation("weight interpolation keeps moments", "algorithms/weight_interpolation.py", "opt_state = context.optimiser.init(params)", "opt_state = state.opt_state", "weight_interpolation"),
    Mutation("wise_ft averages with the wrong weight", "algorithms/wise_ft.py", "interpolate(new, old, old_weight)", "interpolate(new, old, 1 - old_weight)", "wise"),
    Mutation("fisher merging of swapped Fishers", "algorithms/fisher_merging.py", "share = f_old /", "share = f_new /", "fisher_merging"),
    Mutation("ema uses the new weights alone", "algorithms/ema.py", "moved_teacher(old, new, d, record.batch)", "moved_teacher(old, new, 1 - d, record.batch)", "ema"),
    Mutation("ema moves on padding", "algorithms/ema.py", "learned = jnp.any(record.batch.weight > 0)", "learned = jnp.array(True)", "ema"),
    Mutation("packnet lets frozen weights move", "algorithms/packnet.py", "params = _where(lambda owner: owner >= state.task, part.owner, state.params, record.old_params)", "params = state.params", "packnet"),
    Mutation("packnet prunes the largest", "algorithms/packnet.py", "jnp.where(free, magnitude, jnp.inf)", "jnp.where(free, -magnitude, jnp.inf)", "packnet"),
    Mutation("continual backprop without correction", "algorithms/continual_backprop.py", "lowest(use / corrected,", "lowest(use / corrected**2,", "backprop"),
    Mutation("continual backprop resets at once", "algorithms/continual_backprop.py", "eligible = age > maturity", "eligible = age >= maturity", "backprop"),
    Mutation("redo resets the active", "algorithms/redo.py", "activity <= threshold", "activity >= threshold", "redo"),
    Mutation("shrink by the wrong factor", "algorithms/shrink_and_perturb.py", "(1 - shrink) * leaf", "shrink * leaf", "shrink"),
    Mutation("noise repeated for every leaf", "algorithms/shrink_and_perturb.py", "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0)", "shrink"),
    Mutation("reset_optimiser does nothing", "algorithms/reset_optimiser.py", "opt_state=context.optimiser.init(state.params)", "opt_state=state.opt_state", "reset"),
    Mutation("maml answers without adapting", "algorithms/maml.py", "return self.answer(context, state, params, query, active)", "return self.answer(context, state, state.params, query, active)", "maml"),
    Mutation("maml is always of first order", "estimators/inner_loop.py", "if order == 1:", "if order:", "maml"),
    Mutation("anil adapts all layers", "estimators/inner_loop.py", "moves = [not only or any", "moves = [True or any", "anil or oml"),
    Mutation("reptile goes the other way", "algorithms/reptile.py", "jnp.sum(share) * t - jnp.tensordot(share, p, 1)", "jnp.tensordot(share, p, 1) - jnp.sum(share) * t", "reptile"),
    Mutation("la_maml forgets the memory", "algorithms/la_maml.py", "each=lambda phi, _: loss_on(phi, both)", "each=lambda phi, _: loss_on(phi, batch)", "la_maml"),
    Mutation("la_maml remembers every glance", "algorithms/la_maml.py", "part.updates % updates_per_batch == 0", "part.updates % updates_per_batch >= 0", "la_maml or look_ahead or LaMaml"),
    Mutation("tent climbs", "algorithms/tent.py", "each = -jnp.sum(jax.nn.softmax", "each = jnp.sum(jax.nn.softmax", "tent"),
    Mutation("ttt turns all images alike", "algorithms/ttt.py", "quarter_turns(name, x)[turns, jnp", "quarter_turns(name, x)[turns * 0, jnp", "ttt"),
    Mutation("ttt trains without its rotation loss", "algorithms/ttt.py", "return joint * found,", "return 0 * joint * found,", "ttt"),
    Mutation("sdft teacher moves by the complement", "algorithms/sdft.py", "moved_teacher(part.teacher, state.params, decay,", "moved_teacher(part.teacher, state.params, 1 - decay,", "sdft"),
    Mutation("sdft counts skipped tokens", "algorithms/sdft.py", "jnp.arange(length) >= skip", "jnp.arange(length) >= 0 * skip", "sdft"),
    Mutation("divergence the other way", "losses.py", "kl(q, p) if direction", "kl(p, q) if direction", "sdft or distill or divergence", (ALGORITHMS, "tests/estimators")),
    # Estimators and memories.
    Mutation("Fisher of the batch mean", "estimators/moments.py", "moment(wide(seen[name][0])).T @ total[name]", "moment(seen[name][0].T @ jnp.sqrt(total[name]))", "ewc or fisher or Fisher", (ALGORITHMS, "tests/estimators")),
    Mutation("Fisher ignores weights", "estimators/moments.py", "lambda leaf: leaf * batch.weight[:, None], total)", "lambda leaf: leaf, total)", "ewc or fisher or Fisher", (ALGORITHMS, "tests/estimators", LAWS)),
    Mutation("quadratic anchor not moved", "estimators/quadratic.py", "a + s * (b - a)", "a + 0 * s * (b - a)", "ewc or quadratic", (ALGORITHMS, "tests/estimators")),
    Mutation("herding off by one", "estimators/herding.py", "(total - (k + 1) * mean)", "(total - k * mean)", "herding or icarl", (ALGORITHMS, "tests/estimators")),
    Mutation("reservoir counts padding", "buffers.py", "reservoir.seen + jnp.sum(present, dtype=jnp.int32)", "reservoir.seen + present.size", "replay or reservoir or Reservoir", (ALGORITHMS, "tests/test_buffers.py", LAWS)),
    Mutation("empty places are replayed", "buffers.py", "held = jnp.minimum(reservoir.seen, capacity)", "held = jnp.minimum(capacity, capacity)", "replay or reservoir", (ALGORITHMS, "tests/test_buffers.py", LAWS)),
    Mutation("units reset without their moments", "estimators/units.py", "lambda its, now, start: now if its is False else jnp.where(its, start, now)", "lambda its, now, start: now", "redo or backprop or units", (ALGORITHMS, "tests/estimators")),
    # What composes and runs.
    Mutation("keys without the step", "_learner.py", "jax.random.fold_in(state_key, step), crc32", "jax.random.fold_in(state_key, 0), crc32", "key", ("tests/test_hooks.py",)),
    Mutation("keys without the name", "_learner.py", 'crc32(f"{name}/{hook}".encode())', 'crc32(f"{hook}".encode())', "key", ("tests/test_hooks.py",)),
    Mutation("padding is not blanked", "_learner.py", "return jnp.where(present, leaf, jnp.zeros_like(leaf))", "return leaf", "supervised or replay or nan", (LAWS,)),
    Mutation("padding alone takes a step", "_learner.py", "jax.lax.cond(jnp.any(batch.weight > 0), step, lambda: kept)", "jax.lax.cond(jnp.any(batch.weight >= 0), step, lambda: kept)", "supervised", (LAWS,)),
    Mutation("penalties are not added", "_learner.py", "gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)", "gradient = gradient", "ewc"),
    Mutation("outputs are not masked", "losses.py", "return jnp.where(active, outputs, jnp.finfo(outputs.dtype).min / 2)", "return outputs", "supervised or ewc"),
    Mutation("fit forgets its grid", "training/_fit.py", "n = min(*(every - step % every for every in grid), end - step)", "n = min(*grid, end - step)", "fit or resume or kill or measure", ("tests/training",)),
    Mutation("fit gives away the key", "training/_fit.py", '"begin": jit(begin_task, donate_argnums=3)', '"begin": jit(begin_task, donate_argnums=(2, 3))', "ewc or fit", ("tests/training/test_measures.py", LAWS)),
    Mutation("stream ends the wrong task", "training/_run_stream.py", "state = finish(learner, stream, key, carry[0], t)", "state = finish(learner, stream, key, carry[0], t * 0)", "ewc or supervised or agem", (LAWS, ALGORITHMS)),
    Mutation("stream trains once more", "training/_run_stream.py", "jax.lax.cond(t < stream.n_tasks, lambda c", "jax.lax.cond(t <= stream.n_tasks, lambda c", "ewc", (LAWS, "tests/training/test_running.py")),
    Mutation("metrics of another task", "training/_run_stream.py", "jax.tree.map(lambda leaf: leaf[:-1], outputs)", "jax.tree.map(lambda leaf: leaf[1:], outputs)", "ewc", (LAWS,)),
    Mutation("parts that constrain changes are lost", "_learner.py", "after = _with_part(after, c, part)", "after = after", "", ("tests/test_hooks.py",)),
    Mutation("parts that prepare changes are lost", "_learner.py", "if c.constrain or after.parts", "if c.constrain or 0 and after.parts", "", ("tests/test_hooks.py",)),
    Mutation("parts change on padding", "_learner.py", "{name: begun.parts[name] for name in changed(state)}", "{name: state.parts[name] for name in changed(state)}", "", ("tests/test_hooks.py",)),
    Mutation("constrain sees the new optimiser state as the old", "_learner.py", "old, state.opt_state, new_params=None", "old, jax.tree.map(lambda leaf: leaf + 1, state.opt_state), new_params=None", "", ("tests/test_hooks.py",)),
    Mutation("greedy actions are drawn", "_learner.py", "if greedy else", "if not greedy else", "act or greedy", ("tests/test_hooks.py", "tests/training/test_measures.py")),
    Mutation("a stride keeps the first value", "training/loop.py", "(first + i) // stride", "(first + i + stride - 1) // stride", "", ("tests/training/test_measures.py",)),
    Mutation("short tasks run to the end of the longest", "training/_run_stream.py", "stream.steps if stream.task_steps is None else stream.task_steps[t]", "stream.steps", "", ("tests/training/test_measures.py",)),
    Mutation("a measure within a task is late", "training/_run_stream.py", "slot = done // period - 1", "slot = done // period", "", ("tests/training/test_measures.py",)),
    Mutation("er_ace lets replayed examples open classes", "algorithms/er_ace.py", 'present(batch.y, weights["incoming"]', "present(batch.y, batch.weight", "er_ace"),
    Mutation("lora forgets its scale", "wrappers/_lora.py", "1.0 if alpha is None else alpha / rank", "1.0", "equation", ("tests/wrappers",)),
)  # fmt: skip


def check() -> None:
    """Every text occurs once."""
    for mutation in MUTATIONS:
        count = (ROOT / "cl_zoo" / mutation.file).read_text().count(mutation.old)
        if count != 1:
            raise SystemExit(f"{mutation.name}: its text occurs {count} times in cl_zoo/{mutation.file}, not once")


def run(mutation: Mutation) -> tuple[str, float]:
    """ "caught", "missed" or "no tests", and seconds."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        file = copy / "cl_zoo" / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider"]
        result = subprocess.run(
            [*command, *mutation.tests, "-k", mutation.where], cwd=copy, capture_output=True, check=False
        )
    outcome = {0: "missed", 1: "caught", 5: "no tests"}.get(result.returncode, f"exit {result.returncode}")
    return outcome, time.perf_counter() - begun


def main() -> None:
    """Runs those named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    check()
    chosen = [m for m in MUTATIONS if not arguments.names or m.name in arguments.names]
    outcomes: dict[str, str] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (outcome, seconds) in zip(chosen, pool.map(run, chosen)):
            outcomes[mutation.name] = outcome
            print(f"{outcome:10s} {seconds:5.0f} s  {mutation.name}", flush=True)
    caught = sum(outcome == "caught" for outcome in outcomes.values())
    print(f"{caught} of {len(outcomes)} caught")
    if not arguments.names:
        with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("mutation", "outcome"), *outcomes.items()])


if __name__ == "__main__":
    main()
