"""Continual learning in JAX: learner = model + optimiser + components."""

from cl_zoo.algorithms.agem import agem
from cl_zoo.algorithms.der import der
from cl_zoo.algorithms.ema import ema
from cl_zoo.algorithms.ewc import ewc
from cl_zoo.algorithms.fisher_merging import fisher_merging
from cl_zoo.algorithms.l2_init import l2_init
from cl_zoo.algorithms.lwf import lwf
from cl_zoo.algorithms.mas import mas
from cl_zoo.algorithms.replay import replay
from cl_zoo.algorithms.reset_optimiser import reset_optimiser
from cl_zoo.algorithms.supervised import cross_entropy, supervised
from cl_zoo.algorithms.synaptic_intelligence import synaptic_intelligence
from cl_zoo.algorithms.weight_interpolation import weight_interpolation
from cl_zoo.algorithms.wise_ft import wise_ft
from cl_zoo.catalogue import Entry, catalogue, cite
from cl_zoo.compose import compose
from cl_zoo.evaluation.evaluate import evaluate
from cl_zoo.models.adapters import from_linen, from_nnx
from cl_zoo.models.cnn import cnn
from cl_zoo.models.mlp import mlp
from cl_zoo.streams.images import permuted_mnist, rotated_mnist, split_mnist
from cl_zoo.streams.sources import LabelledImages, load_digits
from cl_zoo.training.compilation import enable_compilation_cache
from cl_zoo.training.fit import fit
from cl_zoo.training.loop import NonFiniteError, Result
from cl_zoo.training.run_stream import run_stream, stream_program, sweep
from cl_zoo.types import Batch, Component, Context, Learner, Model, Record, Stream, TaskInfo, TrainState

__all__ = [
    "Batch",
    "Component",
    "Context",
    "Entry",
    "LabelledImages",
    "Learner",
    "Model",
    "NonFiniteError",
    "Record",
    "Result",
    "Stream",
    "TaskInfo",
    "TrainState",
    "agem",
    "catalogue",
    "cite",
    "cnn",
    "compose",
    "cross_entropy",
    "der",
    "ema",
    "enable_compilation_cache",
    "evaluate",
    "ewc",
    "fisher_merging",
    "fit",
    "from_linen",
    "from_nnx",
    "l2_init",
    "load_digits",
    "lwf",
    "mas",
    "mlp",
    "permuted_mnist",
    "replay",
    "reset_optimiser",
    "rotated_mnist",
    "run_stream",
    "split_mnist",
    "stream_program",
    "supervised",
    "sweep",
    "synaptic_intelligence",
    "weight_interpolation",
    "wise_ft",
]
