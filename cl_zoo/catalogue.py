"""Every algorithm of the zoo: how to make it, what it needs, where it comes from. To be listed is to be tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cl_zoo.algorithms.continual_backprop import continual_backprop
from cl_zoo.algorithms.ewc import ewc
from cl_zoo.algorithms.lwf import lwf
from cl_zoo.algorithms.redo import redo
from cl_zoo.algorithms.replay import replay
from cl_zoo.algorithms.reset_optimiser import reset_optimiser
from cl_zoo.algorithms.shrink_and_perturb import shrink_and_perturb
from cl_zoo.algorithms.supervised import supervised
from cl_zoo.types import Component

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
      scenarios: that it can be used in; the laws are tested in the first.
      paper: authors, year, title.
      url: of the paper.
      bibtex: of the paper.
      null: where it equals the naive learner; None where nowhere.
      results: name in `experiments/LEDGER.md`, where its reproduction stands.
      own_loss: whether it stands in the place of `supervised`, not beside it.
      trains: whether the network's parameters move.
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

    @property
    def needs(self) -> frozenset[str]:
        """Of `cl_zoo.types.NEEDS`."""
        return self.factory(**self.arguments).needs


_ALL = ("task", "domain", "class")

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
        "",
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
        "",
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
        "",
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
    """BibTeX of the papers behind the named algorithms.

    Args:
      *names: keys of `catalogue()`.

    Raises:
      ValueError: an unknown name; lists the known ones.

    Example:
      >>> print(cite("lwf").splitlines()[0])
      @inproceedings{li2016learning,
    """
    known = catalogue()
    for name in names:
        if name not in known:
            raise ValueError(f"cite: no algorithm is named {name!r}; there are {', '.join(known)}")
    return "\n\n".join(dict.fromkeys(known[name].bibtex for name in names))


def markdown_table() -> str:
    """The catalogue as a table for the README."""
    lines = ["| name | what is kept, and how | needs | paper |", "|---|---|---|---|"]
    for entry in _ENTRIES:
        needs = ", ".join(sorted(entry.needs)).replace("_", " ") or "nothing"
        lines.append(f"| `{entry.name}` | {entry.summary} | {needs} | [{entry.paper.split(',')[0]}]({entry.url}) |")
    return "\n".join(lines)
