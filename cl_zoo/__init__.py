"""Continual learning in JAX: learner = model + optimiser + components."""

from cl_zoo.algorithms.agem import agem
from cl_zoo.algorithms.continual_backprop import continual_backprop
from cl_zoo.algorithms.der import der
from cl_zoo.algorithms.ema import ema
from cl_zoo.algorithms.ewc import ewc
from cl_zoo.algorithms.fisher_merging import fisher_merging
from cl_zoo.algorithms.gdumb import gdumb
from cl_zoo.algorithms.icarl import icarl
from cl_zoo.algorithms.l2_init import l2_init
from cl_zoo.algorithms.la_maml import la_maml, look_ahead_sgd
from cl_zoo.algorithms.lwf import lwf
from cl_zoo.algorithms.maml import maml
from cl_zoo.algorithms.mas import mas
from cl_zoo.algorithms.oml import oml
from cl_zoo.algorithms.packnet import packnet
from cl_zoo.algorithms.redo import redo
from cl_zoo.algorithms.replay import replay
from cl_zoo.algorithms.reptile import reptile
from cl_zoo.algorithms.reset_optimiser import reset_optimiser
from cl_zoo.algorithms.shrink_and_perturb import shrink_and_perturb
from cl_zoo.algorithms.slda import slda
from cl_zoo.algorithms.supervised import cross_entropy, supervised
from cl_zoo.algorithms.synaptic_intelligence import synaptic_intelligence
from cl_zoo.algorithms.tent import tent
from cl_zoo.algorithms.ttt import crop_and_flip, ttt
from cl_zoo.algorithms.weight_interpolation import weight_interpolation
from cl_zoo.algorithms.wise_ft import wise_ft
from cl_zoo.catalogue import Entry, catalogue, cite
from cl_zoo.compose import compose
from cl_zoo.evaluation.adaptation import evaluate_adapting
from cl_zoo.evaluation.evaluate import evaluate
from cl_zoo.evaluation.probes import online_score
from cl_zoo.models.adapters import from_linen, from_nnx
from cl_zoo.models.cnn import cnn
from cl_zoo.models.meta import episodic, with_learning_rates
from cl_zoo.models.mlp import mlp
from cl_zoo.models.resnet import resnet26, resnet_tail
from cl_zoo.models.rotation import with_rotation_head
from cl_zoo.streams.blurry import Mixing, blurry, drifting
from cl_zoo.streams.cifar import load_cifar10, load_cifar10_c
from cl_zoo.streams.corrupted_images import conditions, corrupted_images
from cl_zoo.streams.corruptions import CORRUPTIONS, NOISES, corrupt
from cl_zoo.streams.episodes import few_shot, sinusoids, trajectories
from cl_zoo.streams.few_shot_images import FewShotImages, load_mini_imagenet, load_omniglot
from cl_zoo.streams.images import permuted_mnist, rotated_mnist, split_mnist
from cl_zoo.streams.regression import slowly_changing_regression, squared_error
from cl_zoo.streams.sources import LabelledImages, load_digits
from cl_zoo.training.compilation import enable_compilation_cache
from cl_zoo.training.fit import fit
from cl_zoo.training.loop import NonFiniteError, Result
from cl_zoo.training.run_stream import run_stream, stream_program, sweep
from cl_zoo.types import Batch, Component, Context, Episode, Learner, Model, Record, Stream, TaskInfo, TrainState

__all__ = [
    "CORRUPTIONS",
    "NOISES",
    "Batch",
    "Component",
    "Context",
    "Entry",
    "Episode",
    "FewShotImages",
    "LabelledImages",
    "Learner",
    "Mixing",
    "Model",
    "NonFiniteError",
    "Record",
    "Result",
    "Stream",
    "TaskInfo",
    "TrainState",
    "agem",
    "blurry",
    "catalogue",
    "cite",
    "cnn",
    "compose",
    "conditions",
    "continual_backprop",
    "corrupt",
    "corrupted_images",
    "crop_and_flip",
    "cross_entropy",
    "der",
    "drifting",
    "ema",
    "enable_compilation_cache",
    "episodic",
    "evaluate",
    "evaluate_adapting",
    "ewc",
    "few_shot",
    "fisher_merging",
    "fit",
    "from_linen",
    "from_nnx",
    "gdumb",
    "icarl",
    "l2_init",
    "la_maml",
    "load_cifar10",
    "load_cifar10_c",
    "load_digits",
    "load_mini_imagenet",
    "load_omniglot",
    "look_ahead_sgd",
    "lwf",
    "maml",
    "mas",
    "mlp",
    "oml",
    "online_score",
    "packnet",
    "permuted_mnist",
    "redo",
    "replay",
    "reptile",
    "reset_optimiser",
    "resnet26",
    "resnet_tail",
    "rotated_mnist",
    "run_stream",
    "shrink_and_perturb",
    "sinusoids",
    "slda",
    "slowly_changing_regression",
    "split_mnist",
    "squared_error",
    "stream_program",
    "supervised",
    "sweep",
    "synaptic_intelligence",
    "tent",
    "trajectories",
    "ttt",
    "weight_interpolation",
    "wise_ft",
    "with_learning_rates",
    "with_rotation_head",
]
