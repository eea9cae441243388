"""Every algorithm of the zoo: how to make it, what it needs, where it comes from. To be listed is to be tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import optax

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
from cl_zoo.algorithms.la_maml import la_maml
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
from cl_zoo.algorithms.supervised import supervised
from cl_zoo.algorithms.synaptic_intelligence import synaptic_intelligence
from cl_zoo.algorithms.tent import tent
from cl_zoo.algorithms.ttt import ttt
from cl_zoo.algorithms.weight_interpolation import weight_interpolation
from cl_zoo.algorithms.wise_ft import wise_ft
from cl_zoo.language._decoder import decoder
from cl_zoo.language.answers import answering
from cl_zoo.layers._catalogue import sequence_layers
from cl_zoo.layers.attention import softmax_attention
from cl_zoo.models._mlp import mlp
from cl_zoo.types import Component, Model
from cl_zoo.wrappers.learning_rates import with_learning_rates
from cl_zoo.wrappers.rotation_head import with_rotation_head

__all__ = ["Entry", "Null", "catalogue", "cite"]


class Null(NamedTuple):
    """The setting in which an algorithm does nothing, and so equals the naive learner.

    Attributes:
      arguments: of the factory, over the default ones.
      sgd: whether it holds under plain SGD only.
      why: in words.
    """

    arguments: Mapping[str, Any]
    sgd: bool
    why: str


class Entry(NamedTuple):
    """An algorithm.

    Attributes:
      name: in the catalogue and the ledger.
      summary: what is kept, and how.
      factory: gives a `Component`.
      arguments: that serve as an example, and in the tests.
      numbers: those of them that may be traced, and so swept.
      scenarios: that it can be used in, "episodes" where rows are learning problems of their own, "skills" where they
        are questions with a demonstration; the laws are tested in the first.
      paper: authors, year, title.
      url: of the paper.
      bibtex: of the paper.
      null: where it equals the naive learner; None where nowhere.
      results: name in `experiments/LEDGER.md`, where its reproduction stands.
      own_loss: whether it stands in the place of `supervised`, not beside it.
      trains: whether the network's parameters move.
      wrap: what it needs around the network.
      net: makes the network, where not any will do; an `mlp` with options.
    """

    name: str
    summary: str
    factory: Callable[..., Component]
    arguments: Mapping[str, Any]
    numbers: tuple[str, ...]
    scenarios: tuple[str, ...]
    paper: str
    url: str
    bibtex: str
    null: Null | None
    results: str
    own_loss: bool = False
    trains: bool = True
    wrap: Callable[[Model], Model] | None = None
    net: Callable[..., Model] = mlp

    @property
    def needs(self) -> frozenset[str]:
        """Of `cl_zoo.types.NEEDS`."""
        return self.factory(**self.arguments).needs


_ALL = ("task", "domain", "class")
_EPISODES = ("episodes",)
_SKILLS = ("skills",)
_DECODER = decoder(13, [softmax_attention(8, 2)], layers=1, hidden=8)
_ANSWERS = {"decoder": _DECODER, "length": 3, "stop": (3,)}
_INNER = optax.sgd(0.5)


def _rates(model: Model) -> Model:
    return with_learning_rates(model, 0.5)


def _rotations(model: Model) -> Model:
    return with_rotation_head(model, mlp((5,), 4, hidden=()), reads="output")


def _answering(shape: tuple[int, ...], outputs: int, **options: Any) -> Model:
    return answering(_DECODER)


_VAN_DE_VEN = """@article{vandeven2022three,
  title={Three types of incremental learning},
  author={van de Ven, Gido M. and Tuytelaars, Tinne and Tolias, Andreas S.},
  journal={Nature Machine Intelligence}, volume={4}, pages={1185--1197}, year={2022}
}"""
_KIRKPATRICK = """@article{kirkpatrick2017overcoming,
  title={Overcoming catastrophic forgetting in neural networks},
  author={Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and others},
  journal={Proceedings of the National Academy of Sciences}, volume={114}, number={13}, pages={3521--3526}, year={2017}
}"""
_SCHWARZ = """@inproceedings{schwarz2018progress,
  title={Progress \\& compress: A scalable framework for continual learning},
  author={Schwarz, Jonathan and Czarnecki, Wojciech and Luketina, Jelena and Grabska-Barwinska, Agnieszka and others},
  booktitle={International Conference on Machine Learning}, year={2018}
}"""
_LI = """@inproceedings{li2016learning,
  title={Learning without forgetting},
  author={Li, Zhizhong and Hoiem, Derek},
  booktitle={European Conference on Computer Vision}, year={2016}
}"""
_CHAUDHRY = """@article{chaudhry2019tiny,
  title={On tiny episodic memories in continual learning},
  author={Chaudhry, Arslan and Rohrbach, Marcus and Elhoseiny, Mohamed and Ajanthan, Thalaiyasingam and others},
  journal={arXiv preprint arXiv:1902.10486}, year={2019}
}"""
_ZENKE = """@inproceedings{zenke2017continual,
  title={Continual learning through synaptic intelligence},
  author={Zenke, Friedemann and Poole, Ben and Ganguli, Surya},
  booktitle={International Conference on Machine Learning}, year={2017}
}"""
_ALJUNDI = """@inproceedings{aljundi2018memory,
  title={Memory aware synapses: Learning what (not) to forget},
  author={Aljundi, Rahaf and Babiloni, Francesca and Elhoseiny, Mohamed and Rohrbach, Marcus and Tuytelaars, Tinne},
  booktitle={European Conference on Computer Vision}, year={2018}
}"""
_KUMAR = """@article{kumar2023maintaining,
  title={Maintaining plasticity in continual learning via regenerative regularization},
  author={Kumar, Saurabh and Marklund, Henrik and Van Roy, Benjamin},
  journal={arXiv preprint arXiv:2308.11958}, year={2023}
}"""
_BUZZEGA = """@inproceedings{buzzega2020dark,
  title={Dark experience for general continual learning: a strong, simple baseline},
  author={Buzzega, Pietro and Boschini, Matteo and Porrello, Angelo and Abati, Davide and Calderara, Simone},
  booktitle={Advances in Neural Information Processing Systems}, year={2020}
}"""
_CHAUDHRY_AGEM = """@inproceedings{chaudhry2019efficient,
  title={Efficient lifelong learning with {A-GEM}},
  author={Chaudhry, Arslan and Ranzato, Marc'Aurelio and Rohrbach, Marcus and Elhoseiny, Mohamed},
  booktitle={International Conference on Learning Representations}, year={2019}
}"""
_DOHARE = """@article{dohare2024loss,
  title={Loss of plasticity in deep continual learning},
  author={Dohare, Shibhansh and Hernandez-Garcia, J. Fernando and Lan, Qingfeng and Rahman, Parash and others},
  journal={Nature}, volume={632}, pages={768--774}, year={2024}
}"""
_ASH = """@inproceedings{ash2020warm,
  title={On warm-starting neural network training},
  author={Ash, Jordan T. and Adams, Ryan P.},
  booktitle={Advances in Neural Information Processing Systems}, year={2020}
}"""
_SOKAR = """@inproceedings{sokar2023dormant,
  title={The dormant neuron phenomenon in deep reinforcement learning},
  author={Sokar, Ghada and Agarwal, Rishabh and Castro, Pablo Samuel and Evci, Utku},
  booktitle={International Conference on Machine Learning}, year={2023}
}"""
_KOZAL = """@inproceedings{kozal2024continual,
  title={Continual learning with weight interpolation},
  author={Kozal, J{\\k{e}}drzej and Wasilewski, Jan and Krawczyk, Bartosz and Wo{\\'z}niak, Micha{\\l}},
  booktitle={CVPR Workshops}, year={2024}
}"""
_WORTSMAN = """@inproceedings{wortsman2022robust,
  title={Robust fine-tuning of zero-shot models},
  author={Wortsman, Mitchell and Ilharco, Gabriel and Kim, Jong Wook and Li, Mike and others},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2022}
}"""
_MATENA = """@inproceedings{matena2022merging,
  title={Merging models with {F}isher-weighted averaging},
  author={Matena, Michael S. and Raffel, Colin A.},
  booktitle={Advances in Neural Information Processing Systems}, year={2022}
}"""
_TARVAINEN = """@inproceedings{tarvainen2017mean,
  title={Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep
    learning results},
  author={Tarvainen, Antti and Valpola, Harri},
  booktitle={Advances in Neural Information Processing Systems}, year={2017}
}"""
_REBUFFI = """@inproceedings{rebuffi2017icarl,
  title={{iCaRL}: Incremental classifier and representation learning},
  author={Rebuffi, Sylvestre-Alvise and Kolesnikov, Alexander and Sperl, Georg and Lampert, Christoph H.},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition}, year={2017}
}"""
_PRABHU = """@inproceedings{prabhu2020gdumb,
  title={{GDumb}: A simple approach that questions our progress in continual learning},
  author={Prabhu, Ameya and Torr, Philip H. S. and Dokania, Puneet K.},
  booktitle={European Conference on Computer Vision}, year={2020}
}"""
_HAYES = """@inproceedings{hayes2020lifelong,
  title={Lifelong machine learning with deep streaming linear discriminant analysis},
  author={Hayes, Tyler L. and Kanan, Christopher},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops}, year={2020}
}"""
_MALLYA = """@inproceedings{mallya2018packnet,
  title={PackNet: Adding multiple tasks to a single network by iterative pruning},
  author={Mallya, Arun and Lazebnik, Svetlana},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2018}
}"""

_FINN = """@inproceedings{finn2017model,
  title={Model-agnostic meta-learning for fast adaptation of deep networks},
  author={Finn, Chelsea and Abbeel, Pieter and Levine, Sergey},
  booktitle={International Conference on Machine Learning}, year={2017}
}"""
_LI_META = """@article{li2017meta,
  title={{Meta-SGD}: Learning to learn quickly for few-shot learning},
  author={Li, Zhenguo and Zhou, Fengwei and Chen, Fei and Li, Hang},
  journal={arXiv preprint arXiv:1707.09835}, year={2017}
}"""
_RAGHU = """@inproceedings{raghu2020rapid,
  title={Rapid learning or feature reuse? Towards understanding the effectiveness of {MAML}},
  author={Raghu, Aniruddh and Raghu, Maithra and Bengio, Samy and Vinyals, Oriol},
  booktitle={International Conference on Learning Representations}, year={2020}
}"""
_NICHOL = """@article{nichol2018first,
  title={On first-order meta-learning algorithms},
  author={Nichol, Alex and Achiam, Joshua and Schulman, John},
  journal={arXiv preprint arXiv:1803.02999}, year={2018}
}"""
_JAVED = """@inproceedings{javed2019meta,
  title={Meta-learning representations for continual learning},
  author={Javed, Khurram and White, Martha},
  booktitle={Advances in Neural Information Processing Systems}, year={2019}
}"""
_GUPTA = """@inproceedings{gupta2020look,
  title={Look-ahead meta learning for continual learning},
  author={Gupta, Gunshi and Yadav, Karmesh and Paull, Liam},
  booktitle={Advances in Neural Information Processing Systems}, year={2020}
}"""
_SUN = """@inproceedings{sun2020test,
  title={Test-time training with self-supervision for generalization under distribution shifts},
  author={Sun, Yu and Wang, Xiaolong and Liu, Zhuang and Miller, John and Efros, Alexei A. and Hardt, Moritz},
  booktitle={International Conference on Machine Learning}, year={2020}
}"""
_WANG_TENT = """@inproceedings{wang2021tent,
  title={Tent: Fully test-time adaptation by entropy minimization},
  author={Wang, Dequan and Shelhamer, Evan and Liu, Shaoteng and Olshausen, Bruno and Darrell, Trevor},
  booktitle={International Conference on Learning Representations}, year={2021}
}"""
_SHENFELD = """@article{shenfeld2026self,
  title={Self-distillation enables continual learning},
  author={Shenfeld, Idan and Damani, Mehul and H{\\"u}botter, Jonas and Agrawal, Pulkit},
  journal={arXiv preprint arXiv:2601.19897}, year={2026}
}"""
_SNELL = """@article{snell2022learning,
  title={Learning by distilling context},
  author={Snell, Charlie and Klein, Dan and Zhong, Ruiqi},
  journal={arXiv preprint arXiv:2209.15189}, year={2022}
}"""
_KIM = """@inproceedings{kim2016sequence,
  title={Sequence-level knowledge distillation},
  author={Kim, Yoon and Rush, Alexander M.},
  booktitle={Empirical Methods in Natural Language Processing}, year={2016}
}"""
_WU = """@article{wu2025generalization,
  title={On the generalization of {SFT}: A reinforcement learning perspective with reward rectification},
  author={Wu, Yongliang and Zhou, Yizhou and Ziheng, Zhou and Peng, Yingzhe and others},
  journal={arXiv preprint arXiv:2508.05629}, year={2025}
}"""

_ENTRIES = (
    Entry(
        "supervised",
        "nothing: the naive baseline",
        supervised,
        {},
        (),
        _ALL,
        "van de Ven et al. 2022, Three types of incremental learning",
        "https://doi.org/10.1038/s42256-022-00568-3",
        _VAN_DE_VEN,
        Null({}, False, "it is the naive learner"),
        "none",
        own_loss=True,
    ),
    Entry(
        "ewc",
        "parameters of finished tasks, by a quadratic penalty weighted with the Fisher information",
        ewc,
        {"strength": 1e3},
        ("strength",),
        _ALL,
        "Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks",
        "https://arxiv.org/abs/1612.00796",
        _KIRKPATRICK,
        Null({"strength": 0.0}, False, "strength 0"),
        "ewc",
    ),
    Entry(
        "online_ewc",
        "parameters of the last task, by a penalty weighted with a fading sum of Fishers",
        ewc,
        {"strength": 1e3, "decay": 0.9},
        ("strength", "decay"),
        _ALL,
        "Schwarz et al. 2018, Progress & compress: A scalable framework for continual learning",
        "https://arxiv.org/abs/1805.06370",
        _SCHWARZ,
        Null({"strength": 0.0}, False, "strength 0"),
        "online ewc",
    ),
    Entry(
        "synaptic_intelligence",
        "parameters of finished tasks, by what each did for the loss along the path of training",
        synaptic_intelligence,
        {"strength": 1.0, "damping": 0.1},
        ("strength", "damping"),
        _ALL,
        "Zenke et al. 2017, Continual learning through synaptic intelligence",
        "https://arxiv.org/abs/1703.04200",
        _ZENKE,
        Null({"strength": 0.0}, False, "strength 0"),
        "si",
    ),
    Entry(
        "mas",
        "parameters that the answers are sensitive to, without labels",
        mas,
        {"strength": 1.0},
        ("strength",),
        _ALL,
        "Aljundi et al. 2018, Memory aware synapses: Learning what (not) to forget",
        "https://arxiv.org/abs/1711.09601",
        _ALJUNDI,
        Null({"strength": 0.0}, False, "strength 0"),
        "mas",
    ),
    Entry(
        "l2_init",
        "plasticity, by drawing parameters back to their first values",
        l2_init,
        {"strength": 1e-2},
        ("strength",),
        _ALL,
        "Kumar et al. 2023, Maintaining plasticity in continual learning via regenerative regularization",
        "https://arxiv.org/abs/2308.11958",
        _KUMAR,
        Null({"strength": 0.0}, False, "strength 0"),
        "l2 init",
    ),
    Entry(
        "lwf",
        "the last model's answers to the new inputs, by distillation",
        lwf,
        {"strength": 1.0, "temperature": 2.0},
        ("strength", "temperature"),
        _ALL,
        "Li and Hoiem 2016, Learning without forgetting",
        "https://arxiv.org/abs/1606.09282",
        _LI,
        Null({"strength": 0.0}, False, "strength 0"),
        "lwf",
    ),
    Entry(
        "replay",
        "a uniform sample of all rows seen, rehearsed with every batch",
        replay,
        {"capacity": 20, "batch_size": 8},
        (),
        _ALL,
        "Chaudhry et al. 2019, On tiny episodic memories in continual learning",
        "https://arxiv.org/abs/1902.10486",
        _CHAUDHRY,
        Null({"batch_size": 0}, False, "0 rows replayed"),
        "replay",
    ),
    Entry(
        "der",
        "a sample of all rows seen, with the answers they got when they came",
        der,
        {"capacity": 20, "batch_size": 8, "alpha": 0.5},
        ("alpha",),
        _ALL,
        "Buzzega et al. 2020, Dark experience for general continual learning",
        "https://arxiv.org/abs/2004.07211",
        _BUZZEGA,
        Null({"alpha": 0.0}, False, "alpha 0"),
        "der",
    ),
    Entry(
        "der_plus_plus",
        "the same, with labels too, on a draw of their own",
        der,
        {"capacity": 20, "batch_size": 8, "alpha": 0.5, "beta": 0.5},
        ("alpha", "beta"),
        _ALL,
        "Buzzega et al. 2020, Dark experience for general continual learning",
        "https://arxiv.org/abs/2004.07211",
        _BUZZEGA,
        Null({"alpha": 0.0, "beta": 0.0}, False, "alpha and beta 0"),
        "der++",
    ),
    Entry(
        "agem",
        "the loss on rows of finished tasks, which no step may raise",
        agem,
        {"capacity": 20, "batch_size": 8},
        (),
        _ALL,
        "Chaudhry et al. 2019, Efficient lifelong learning with A-GEM",
        "https://arxiv.org/abs/1812.00420",
        _CHAUDHRY_AGEM,
        None,
        "a-gem",
    ),
    Entry(
        "icarl",
        "exemplars chosen by herding and the last model's outputs; the nearest mean of exemplars answers",
        icarl,
        {"capacity": 20, "n_classes": 6, "batch_size": 8, "temperature": 1.0},
        ("temperature",),
        ("class",),
        "Rebuffi et al. 2017, iCaRL: Incremental classifier and representation learning",
        "https://arxiv.org/abs/1611.07725",
        _REBUFFI,
        None,
        "icarl",
        own_loss=True,
    ),
    Entry(
        "gdumb",
        "a class-balanced memory; at each task's end a new network is trained on it alone",
        gdumb,
        {"capacity": 20, "n_classes": 6, "epochs": 2, "batch_size": 8},
        (),
        _ALL,
        "Prabhu et al. 2020, GDumb: A simple approach that questions our progress in continual learning",
        "https://doi.org/10.1007/978-3-030-58536-5_31",
        _PRABHU,
        None,
        "gdumb",
        own_loss=True,
    ),
    Entry(
        "slda",
        "a mean per class and one covariance of features; a linear discriminant answers",
        slda,
        {"shrinkage": 1e-3},
        ("shrinkage",),
        _ALL,
        "Hayes and Kanan 2020, Lifelong machine learning with deep streaming linear discriminant analysis",
        "https://arxiv.org/abs/1909.01520",
        _HAYES,
        None,
        "slda",
        own_loss=True,
        trains=False,
    ),
    Entry(
        "weight_interpolation",
        "the old weights, permuted into the new ones' order and averaged with them after each task",
        weight_interpolation,
        {"alpha": 0.5},
        ("alpha",),
        _ALL,
        "Kozal et al. 2024, Continual learning with weight interpolation",
        "https://arxiv.org/abs/2404.04002",
        _KOZAL,
        Null({"alpha": 0.0}, True, "alpha 0, and an optimiser without state"),
        "+ activations",
    ),
    Entry(
        "wise_ft",
        "the weights from before each task, averaged with the new ones at its end",
        wise_ft,
        {"alpha": 0.5},
        ("alpha",),
        _ALL,
        "Wortsman et al. 2022, Robust fine-tuning of zero-shot models",
        "https://arxiv.org/abs/2109.01903",
        _WORTSMAN,
        Null({"alpha": 1.0}, False, "alpha 1"),
        "wise-ft",
    ),
    Entry(
        "fisher_merging",
        "the models of all tasks, averaged with the weights of their Fisher information",
        fisher_merging,
        {"balance": 0.5, "decay": 1.0},
        ("balance", "decay"),
        _ALL,
        "Matena and Raffel 2022, Merging models with Fisher-weighted averaging",
        "https://arxiv.org/abs/2111.09832",
        _MATENA,
        Null({"balance": 1.0}, False, "balance 1"),
        "fisher merging",
    ),
    Entry(
        "ema",
        "a moving average of the weights, which answers in the network's place",
        ema,
        {"decay": 0.9},
        ("decay",),
        _ALL,
        "Tarvainen and Valpola 2017, Mean teachers are better role models",
        "https://arxiv.org/abs/1703.01780",
        _TARVAINEN,
        Null({"decay": 0.0}, False, "decay 0"),
        "ema",
    ),
    Entry(
        "packnet",
        "the largest of the free weights, for each task, frozen to the bit; the others are handed on",
        packnet,
        {"prune": 0.5, "retrain_steps": 4},
        ("prune",),
        ("task",),
        "Mallya and Lazebnik 2018, PackNet: Adding multiple tasks to a single network by iterative pruning",
        "https://arxiv.org/abs/1711.05769",
        _MALLYA,
        None,
        "packnet",
    ),
    Entry(
        "maml",
        "parameters from which a few gradient steps on a new problem go far",
        maml,
        {"inner": _INNER, "inner_steps": 2},
        (),
        _EPISODES,
        "Finn et al. 2017, Model-agnostic meta-learning for fast adaptation of deep networks",
        "https://arxiv.org/abs/1703.03400",
        _FINN,
        Null({"inner_steps": 0}, False, "no inner steps: joint training"),
        "maml",
        own_loss=True,
    ),
    Entry(
        "first_order_maml",
        "the same, inner gradients taken as constants",
        maml,
        {"inner": _INNER, "inner_steps": 2, "order": 1},
        (),
        _EPISODES,
        "Finn et al. 2017, Model-agnostic meta-learning for fast adaptation of deep networks",
        "https://arxiv.org/abs/1703.03400",
        _FINN,
        Null({"inner_steps": 0}, False, "no inner steps: joint training"),
        "fomaml",
        own_loss=True,
    ),
    Entry(
        "anil",
        "the same, only the last layer learns from a new problem",
        maml,
        {"inner": _INNER, "inner_steps": 2, "only": ("output",)},
        (),
        _EPISODES,
        "Raghu et al. 2020, Rapid learning or feature reuse?",
        "https://arxiv.org/abs/1909.09157",
        _RAGHU,
        Null({"inner_steps": 0}, False, "no inner steps: joint training"),
        "anil",
        own_loss=True,
    ),
    Entry(
        "meta_sgd",
        "the same, and a learned rate for each parameter",
        maml,
        {"inner": "learned"},
        (),
        _EPISODES,
        "Li et al. 2017, Meta-SGD: Learning to learn quickly for few-shot learning",
        "https://arxiv.org/abs/1707.09835",
        _LI_META,
        Null({"inner_steps": 0}, False, "no inner steps: joint training"),
        "meta-sgd",
        own_loss=True,
        wrap=_rates,
    ),
    Entry(
        "reptile",
        "parameters near those that training on each problem arrives at",
        reptile,
        {"inner": _INNER, "inner_steps": 3, "rows": 2},
        (),
        _EPISODES,
        "Nichol et al. 2018, On first-order meta-learning algorithms",
        "https://arxiv.org/abs/1803.02999",
        _NICHOL,
        None,
        "reptile",
        own_loss=True,
    ),
    Entry(
        "oml",
        "a representation on which learning row by row does not interfere",
        oml,
        {"inner_rate": 0.5},
        ("inner_rate",),
        _EPISODES,
        "Javed and White 2019, Meta-learning representations for continual learning",
        "https://arxiv.org/abs/1905.12588",
        _JAVED,
        Null({"inner_rate": 0.0}, False, "inner rate 0: joint training"),
        "",
        own_loss=True,
    ),
    Entry(
        "la_maml",
        "rows, and a learning rate for each parameter: low where learning would disturb what they say",
        la_maml,
        {"capacity": 20, "batch_size": 8, "glances": 2},
        (),
        _ALL,
        "Gupta et al. 2020, Look-ahead meta learning for continual learning",
        "https://arxiv.org/abs/2007.13904",
        _GUPTA,
        None,
        "la-maml",
        own_loss=True,
        wrap=_rates,
    ),
    Entry(
        "c_maml",
        "rows, on which every look ahead along the new ones is judged",
        la_maml,
        {"capacity": 20, "batch_size": 8, "rate": 0.5},
        ("rate",),
        _ALL,
        "Gupta et al. 2020, Look-ahead meta learning for continual learning",
        "https://arxiv.org/abs/2007.13904",
        _GUPTA,
        None,
        "c-maml",
        own_loss=True,
    ),
    Entry(
        "continual_backprop",
        "nothing; units of least use are made anew, so that the net stays able to learn",
        continual_backprop,
        {"replacement_rate": 0.0625, "maturity": 2},
        ("replacement_rate",),
        _ALL,
        "Dohare et al. 2024, Loss of plasticity in deep continual learning",
        "https://doi.org/10.1038/s41586-024-07711-7",
        _DOHARE,
        Null({"replacement_rate": 0.0}, False, "no unit replaced"),
        "continual backprop",
    ),
    Entry(
        "shrink_and_perturb",
        "nothing; parameters are drawn towards 0 and shaken, so that the net stays able to learn",
        shrink_and_perturb,
        {"shrink": 1e-2, "noise": 1e-2},
        ("shrink", "noise"),
        _ALL,
        "Ash and Adams 2020, On warm-starting neural network training",
        "https://arxiv.org/abs/1910.08475",
        _ASH,
        Null({"shrink": 0.0, "noise": 0.0}, False, "nothing shrunk, no noise"),
        "shrink and perturb",
    ),
    Entry(
        "redo",
        "nothing; units that hardly fire are made anew, so that the net stays able to learn",
        redo,
        {"threshold": 0.8, "every": 3},
        ("threshold",),
        _ALL,
        "Sokar et al. 2023, The dormant neuron phenomenon in deep reinforcement learning",
        "https://arxiv.org/abs/2302.12902",
        _SOKAR,
        Null({"every": 10**6}, False, "never looked at"),
        "redo",
    ),
    Entry(
        "reset_optimiser",
        "nothing; the optimiser's moments are forgotten with each task",
        reset_optimiser,
        {},
        (),
        _ALL,
        "Zenke et al. 2017, Continual learning through synaptic intelligence",
        "https://arxiv.org/abs/1703.04200",
        _ZENKE,
        Null({}, True, "an optimiser without state"),
        "",
    ),
    Entry(
        "ttt",
        "nothing; before it answers, the trunk learns from the test image which way up it is",
        ttt,
        {"learning_rate": 0.1, "joint": 1.0, "steps": 2, "views": 4},
        ("learning_rate", "joint"),
        _ALL,
        "Sun et al. 2020, Test-time training with self-supervision for generalization under distribution shifts",
        "https://arxiv.org/abs/1909.13231",
        _SUN,
        Null({"joint": 0.0, "learning_rate": 0.0}, False, "rotation loss of weight 0, test-time steps of size 0"),
        "ttt",
        wrap=_rotations,
    ),
    Entry(
        "tent",
        "nothing; scales and biases of normalisation layers learn to be sure of the test batch",
        tent,
        {"learning_rate": 0.1},
        ("learning_rate",),
        _ALL,
        "Wang et al. 2021, Tent: Fully test-time adaptation by entropy minimization",
        "https://arxiv.org/abs/2006.10726",
        _WANG_TENT,
        Null({"learning_rate": 0.0}, False, "in training at any setting; with rate 0 nothing moves at test time"),
        "tent",
        net=partial(mlp, norm="batch"),
    ),
    Entry(
        "sdft",
        "what was known, by learning from its own answers, which it grades with a demonstration before its eyes",
        sdft,
        {**_ANSWERS, "skip": 0, "rate": 0.25},
        ("rate",),
        _SKILLS,
        "Shenfeld et al. 2026, Self-distillation enables continual learning",
        "https://arxiv.org/abs/2601.19897",
        _SHENFELD,
        None,
        "sdft forward",
        own_loss=True,
        net=_answering,
    ),
    Entry(
        "context_distillation",
        "nothing but what follows from learning its own answers to a demonstration, word by word",
        context_distillation,
        _ANSWERS,
        (),
        _SKILLS,
        "Snell et al. 2022, Learning by distilling context",
        "https://arxiv.org/abs/2209.15189",
        _SNELL,
        None,
        "context distillation",
        own_loss=True,
        net=_answering,
    ),
    Entry(
        "offline_distillation",
        "nothing but what follows from fine-tuning on its own answers to a demonstration",
        offline_distillation,
        _ANSWERS,
        (),
        _SKILLS,
        "Kim and Rush 2016, Sequence-level knowledge distillation",
        "https://arxiv.org/abs/1606.07947",
        _KIM,
        None,
        "offline distillation",
        own_loss=True,
        net=_answering,
    ),
    Entry(
        "dft",
        "what was known, by learning from labels as far as the network would have said them itself",
        dft,
        {},
        (),
        _SKILLS,
        "Wu et al. 2025, On the generalization of SFT",
        "https://arxiv.org/abs/2508.05629",
        _WU,
        None,
        "dft",
        own_loss=True,
        net=_answering,
    ),
)


def catalogue() -> dict[str, Entry]:
    """All algorithms by name.

    Example:
      >>> sorted(catalogue()["ewc"].needs)
      ['boundaries', 'end_sample']
    """
    return {entry.name: entry for entry in _ENTRIES}


def cite(*names: str) -> str:
    """BibTeX of the papers behind the named algorithms and layers.

    Args:
      *names: keys of `catalogue()` or `sequence_layers()`.

    Raises:
      ValueError: an unknown name; lists the known ones.

    Example:
      >>> print(cite("lwf").splitlines()[0])
      @inproceedings{li2016learning,
    """
    known = {name: entry.bibtex for entries in (catalogue(), sequence_layers()) for name, entry in entries.items()}
    for name in names:
        if name not in known:
            raise ValueError(f"cite: no algorithm or layer is named {name!r}; there are {', '.join(known)}")
    return "\n\n".join(dict.fromkeys(known[name] for name in names))


def markdown_table() -> str:
    """The catalogue as a table for the README."""
    lines = ["| name | what is kept, and how | needs | paper |", "|---|---|---|---|"]
    for entry in _ENTRIES:
        needs = ", ".join(sorted(entry.needs)).replace("_", " ") or "nothing"
        lines.append(f"| `{entry.name}` | {entry.summary} | {needs} | [{entry.paper.split(',')[0]}]({entry.url}) |")
    return "\n".join(lines)
