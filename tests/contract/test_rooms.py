"""What a paper speaks of is in the room that its name says; how large the public surface is; what an import costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cl_zoo

SENTENCES = {
    "Fisher diagonal": "estimators.fisher.fisher_diagonal",
    "herding": "estimators.herding.herding_ranks",
    "permutation alignment": "estimators.alignment.match_activations",
    "Hungarian assignment": "estimators.alignment.assign",
    "inner-loop step": "estimators.inner_loop.inner_loop",
    "reservoir insertion": "buffers.reservoir_add",
    "rotation head": "wrappers.rotation_head.with_rotation_head",
    "KV cache": "layers.attention.KeyValues",
    "teacher EMA": "estimators.teacher.moved_teacher",
    "next-token loss": "losses.next_token_loss",
    "class order": "streams.images.split_mnist",
    "chat template": "language.tokenization.TextTokenizer.chat",
    "rotary embedding": "layers.rotary",
    "BatchNorm re-estimation": "estimators.averaging.recompute_statistics",
    "output mask": "losses.mask_outputs",
    "cross-entropy": "losses.cross_entropy",
    "distillation divergence": "losses.divergence",
    "path integral of the loss": "algorithms.synaptic_intelligence.synaptic_intelligence",
    "gradient projection": "estimators.projection.project_conflict",
    "quadratic penalty in constant memory": "estimators.quadratic.add_quadratic",
    "weight averaging": "estimators.averaging.interpolate",
    "low-rank adapter": "wrappers.lora",
    "per-parameter learning rates": "wrappers.learning_rates.with_learning_rates",
    "image corruptions": "datasets.corruptions.corrupt",
    "Omniglot": "datasets.few_shot_images.load_omniglot",
    "blurry task boundaries": "streams.blurry",
    "few-shot episodes": "streams.few_shot",
    "accuracy matrix": "evaluation.measures.accuracy",
    "forgetting": "evaluation.metrics.forgetting",
    "dormant units": "evaluation.probes.dormant_fraction",
    "checkpoint": "training.checkpoint.Checkpoints",
    "nucleus sampling": "language.generate",
    "group normalisation": "models.normalisation.normalising",
    "asymmetric cross-entropy": "algorithms.er_ace.er_ace",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_a_sentence_names_is_in_its_room(sentence: str) -> None:
    found: object = cl_zoo
    path = "cl_zoo"
    for name in SENTENCES[sentence].split("."):
        path = f"{path}.{name}"
        if isinstance(found, ModuleType) and not hasattr(found, name):
            importlib.import_module(path)
        found = getattr(found, name)
    assert callable(found)


def test_top_level_names_are_few_and_hide_no_module() -> None:
    names = [name for name in cl_zoo.__all__ if not isinstance(getattr(cl_zoo, name), ModuleType)]
    assert len(names) <= 60
    root = Path(cl_zoo.__file__).parent
    for package in (root, *(folder for folder in root.iterdir() if (folder / "__init__.pyi").exists())):
        module = importlib.import_module("cl_zoo" if package == root else f"cl_zoo.{package.name}")
        hidden = [
            n
            for n in module.__all__
            if (package / f"{n}.py").exists() and not isinstance(getattr(module, n), ModuleType)
        ]
        assert hidden == [], f"{hidden} hide modules of their name in {package.name}"


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import time, jax, optax, sys; begun = time.perf_counter(); import cl_zoo; took = time.perf_counter() - begun;"
        "assert took < 0.2, took; loaded = {'flax', 'matplotlib', 'orbax', 'orbax.checkpoint'} & set(sys.modules);"
        "cl_zoo.compose, cl_zoo.run_stream, cl_zoo.ewc, cl_zoo.catalogue();"
        "loaded |= {'flax', 'matplotlib', 'orbax', 'orbax.checkpoint'} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_files_fit_one_sitting() -> None:
    files = Path(cl_zoo.__file__).parent.rglob("*.py")
    lines = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lines.items() if n > (280 if name == "_compose.py" else 400)} == {}
