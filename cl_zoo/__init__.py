"""Continual learning in JAX: learner = model + optimiser + components."""

from cl_zoo.algorithms.agem import agem
from cl_zoo.algorithms.continual_backprop import continual_backprop
from cl_zoo.algorithms.der import der
from cl_zoo.algorithms.dft import dft
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
from cl_zoo.algorithms.sdft import context_distillation, offline_distillation, sdft
from cl_zoo.algorithms.shrink_and_perturb import shrink_and_perturb
from cl_zoo.algorithms.slda import slda
from cl_zoo.algorithms.supervised import cross_entropy, supervised
from cl_zoo.algorithms.synaptic_intelligence import synaptic_intelligence
from cl_zoo.algorithms.tent import tent
from cl_zoo.algorithms.ttt import crop_and_flip, ttt
from cl_zoo.algorithms.weight_interpolation import weight_interpolation
from cl_zoo.algorithms.wise_ft import wise_ft
from cl_zoo.catalogue import Entry, catalogue, cite
from cl_zoo.compilation import enable_compilation_cache
from cl_zoo.compose import compose
from cl_zoo.estimators.distillation import divergence
from cl_zoo.estimators.tokens import (
    all_tokens_right,
    dynamic_fine_tuning_loss,
    next_token_loss,
    token_accuracy,
    token_losses,
)
from cl_zoo.evaluation.adaptation import evaluate_adapting
from cl_zoo.evaluation.evaluate import evaluate
from cl_zoo.evaluation.probes import online_score
from cl_zoo.layers.attention import softmax_attention, window_attention
from cl_zoo.layers.catalogue import LayerEntry, sequence_layers
from cl_zoo.layers.delta_rule import delta_rule, gated_delta_rule
from cl_zoo.layers.lact import lact
from cl_zoo.layers.linear_attention import gated_linear_attention, linear_attention
from cl_zoo.layers.mixer import Mixer, RotaryScaling
from cl_zoo.layers.titans import titans
from cl_zoo.layers.ttt import ttt_linear, ttt_mlp
from cl_zoo.models.adapters import from_linen, from_nnx
from cl_zoo.models.answers import Demonstrated, answer_logits, answering
from cl_zoo.models.cnn import cnn
from cl_zoo.models.decoder import Decoder, decoder, unstacked
from cl_zoo.models.decoder_config import DecoderConfig, config_of
from cl_zoo.models.generate import Generated, generate
from cl_zoo.models.lora import lora, merge_adapters, unmerge_adapters
from cl_zoo.models.meta import episodic, with_learning_rates
from cl_zoo.models.mlp import mlp
from cl_zoo.models.pretrained import Pretrained, load_pretrained, save_pretrained
from cl_zoo.models.resnet import resnet26, resnet_tail
from cl_zoo.models.rotation import with_rotation_head
from cl_zoo.models.tokenization import TextTokenizer, left_padded, load_tokenizer
from cl_zoo.streams.blurry import Mixing, blurry, drifting
from cl_zoo.streams.cifar import load_cifar10, load_cifar10_c
from cl_zoo.streams.corrupted_images import conditions, corrupted_images
from cl_zoo.streams.corruptions import CORRUPTIONS, NOISES, corrupt
from cl_zoo.streams.episodes import few_shot, sinusoids, trajectories
from cl_zoo.streams.few_shot_images import FewShotImages, load_mini_imagenet, load_omniglot
from cl_zoo.streams.images import permuted_mnist, rotated_mnist, split_mnist
from cl_zoo.streams.recall import associative_recall, best_dictionary_scores, fresh_dictionaries
from cl_zoo.streams.regression import slowly_changing_regression, squared_error
from cl_zoo.streams.skills import Example, SymbolWorld, skills
from cl_zoo.streams.sources import LabelledImages, load_digits
from cl_zoo.streams.text import text_domains
from cl_zoo.streams.text_sources import python_library, read_text_domains
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
    "Decoder",
    "DecoderConfig",
    "Demonstrated",
    "Entry",
    "Episode",
    "Example",
    "FewShotImages",
    "Generated",
    "LabelledImages",
    "LayerEntry",
    "Learner",
    "Mixer",
    "Mixing",
    "Model",
    "NonFiniteError",
    "Pretrained",
    "Record",
    "Result",
    "RotaryScaling",
    "Stream",
    "SymbolWorld",
    "TaskInfo",
    "TextTokenizer",
    "TrainState",
    "agem",
    "all_tokens_right",
    "answer_logits",
    "answering",
    "associative_recall",
    "best_dictionary_scores",
    "blurry",
    "catalogue",
    "cite",
    "cnn",
    "compose",
    "conditions",
    "config_of",
    "context_distillation",
    "continual_backprop",
    "corrupt",
    "corrupted_images",
    "crop_and_flip",
    "cross_entropy",
    "decoder",
    "delta_rule",
    "der",
    "dft",
    "divergence",
    "drifting",
    "dynamic_fine_tuning_loss",
    "ema",
    "enable_compilation_cache",
    "episodic",
    "evaluate",
    "evaluate_adapting",
    "ewc",
    "few_shot",
    "fisher_merging",
    "fit",
    "fresh_dictionaries",
    "from_linen",
    "from_nnx",
    "gated_delta_rule",
    "gated_linear_attention",
    "gdumb",
    "generate",
    "icarl",
    "l2_init",
    "la_maml",
    "lact",
    "left_padded",
    "linear_attention",
    "load_cifar10",
    "load_cifar10_c",
    "load_digits",
    "load_mini_imagenet",
    "load_omniglot",
    "load_pretrained",
    "load_tokenizer",
    "look_ahead_sgd",
    "lora",
    "lwf",
    "maml",
    "mas",
    "merge_adapters",
    "mlp",
    "next_token_loss",
    "offline_distillation",
    "oml",
    "online_score",
    "packnet",
    "permuted_mnist",
    "python_library",
    "read_text_domains",
    "redo",
    "replay",
    "reptile",
    "reset_optimiser",
    "resnet26",
    "resnet_tail",
    "rotated_mnist",
    "run_stream",
    "save_pretrained",
    "sdft",
    "sequence_layers",
    "shrink_and_perturb",
    "sinusoids",
    "skills",
    "slda",
    "slowly_changing_regression",
    "softmax_attention",
    "split_mnist",
    "squared_error",
    "stream_program",
    "supervised",
    "sweep",
    "synaptic_intelligence",
    "tent",
    "text_domains",
    "titans",
    "token_accuracy",
    "token_losses",
    "trajectories",
    "ttt",
    "ttt_linear",
    "ttt_mlp",
    "unmerge_adapters",
    "unstacked",
    "weight_interpolation",
    "window_attention",
    "wise_ft",
    "with_learning_rates",
    "with_rotation_head",
]
