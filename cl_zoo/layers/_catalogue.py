"""Every sequence layer of the zoo: how to make it, what its state is, where it comes from; all listed are tested.

All are `Mixer`s, exchangeable in one model. They differ in what they remember, and in how they write it:

- Attention keeps tokens: all of them, or a window.
- Linear attention and the delta rule keep a matrix from keys to values. The first adds, the second corrects; a gate
  decays what was there.
- Layers that are trained at test time keep a network, and write by gradient descent. Three things have that name.
  TTT-Linear and TTT-MLP take gradients of a reconstruction through LayerNorm and a residual, for mini-batches of tokens
  with a causal mask within: a token reads what it wrote. Titans adds momentum and decay, without norm or residual. LaCT
  writes once for a large chunk, without a mask and along k and v's product, and its tokens do not read what their own
  chunk wrote: attention to a window stands beside it. (Layers of video models have rate 1/b, and see a whole mini-batch
  both ways; they are not causal, and not here.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cl_zoo.layers._delta_rule import delta_rule, gated_delta_rule
from cl_zoo.layers._lact import lact
from cl_zoo.layers._linear_attention import gated_linear_attention, linear_attention
from cl_zoo.layers._titans import titans
from cl_zoo.layers.attention import softmax_attention, window_attention
from cl_zoo.layers.mixer import Mixer
from cl_zoo.layers.ttt import ttt_linear, ttt_mlp

__all__ = ["LayerEntry", "sequence_layers"]


class LayerEntry(NamedTuple):
    """A sequence layer.

    Attributes:
      name: in the catalogue.
      summary: what the state is, and how it is written.
      factory: `(width, heads, **arguments)` gives a `Mixer`.
      arguments: that serve as an example, and in the tests.
      numbers: arguments that may be traced.
      state: "grows" with the tokens seen, and time with their square; or "constant", and time is linear.
      frozen: arguments under which nothing is written, with the same parameters; None where the state begins empty.
      paper: authors, year, title.
      url: of the paper.
      bibtex: of the paper.
    """

    name: str
    summary: str
    factory: Callable[..., Mixer]
    arguments: Mapping[str, Any]
    numbers: tuple[str, ...]
    state: str
    frozen: Mapping[str, Any] | None
    paper: str
    url: str
    bibtex: str


_VASWANI = """@inproceedings{vaswani2017attention,
  title={Attention is all you need},
  author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and others},
  booktitle={Advances in Neural Information Processing Systems}, volume={30}, year={2017}
}"""
_BELTAGY = """@article{beltagy2020longformer,
  title={Longformer: The long-document transformer},
  author={Beltagy, Iz and Peters, Matthew E. and Cohan, Arman},
  journal={arXiv preprint arXiv:2004.05150}, year={2020}
}"""
_KATHAROPOULOS = """@inproceedings{katharopoulos2020transformers,
  title={Transformers are {RNN}s: Fast autoregressive transformers with linear attention},
  author={Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, Fran\\c{c}ois},
  booktitle={International Conference on Machine Learning}, year={2020}
}"""
_YANG_GATED = """@inproceedings{yang2024gated,
  title={Gated linear attention transformers with hardware-efficient training},
  author={Yang, Songlin and Wang, Bailin and Shen, Yikang and Panda, Rameswar and Kim, Yoon},
  booktitle={International Conference on Machine Learning}, year={2024}
}"""
_YANG_DELTA = """@inproceedings{yang2024parallelizing,
  title={Parallelizing linear transformers with the delta rule over sequence length},
  author={Yang, Songlin and Wang, Bailin and Zhang, Yu and Shen, Yikang and Kim, Yoon},
  booktitle={Advances in Neural Information Processing Systems}, volume={37}, year={2024}
}"""
_SCHLAG = """@inproceedings{schlag2021linear,
  title={Linear transformers are secretly fast weight programmers},
  author={Schlag, Imanol and Irie, Kazuki and Schmidhuber, J\\"urgen},
  booktitle={International Conference on Machine Learning}, year={2021}
}"""
_YANG_GATED_DELTA = """@inproceedings{yang2025gated,
  title={Gated delta networks: Improving {Mamba2} with delta rule},
  author={Yang, Songlin and Kautz, Jan and Hatamizadeh, Ali},
  booktitle={International Conference on Learning Representations}, year={2025}
}"""
_SUN = """@article{sun2024learning,
  title={Learning to (learn at test time): {RNN}s with expressive hidden states},
  author={Sun, Yu and Li, Xinhao and Dalal, Karan and Xu, Jiarui and Vikram, Arjun and Zhang, Genghan and others},
  journal={arXiv preprint arXiv:2407.04620}, year={2024}
}"""
_BEHROUZ = """@article{behrouz2025titans,
  title={Titans: Learning to memorize at test time},
  author={Behrouz, Ali and Zhong, Peilin and Mirrokni, Vahab},
  journal={arXiv preprint arXiv:2501.00663}, year={2025}
}"""
_ZHANG = """@article{zhang2025test,
  title={Test-time training done right},
  author={Zhang, Tianyuan and Bi, Sai and Hong, Yicong and Zhang, Kai and Luan, Fujun and Yang, Songlin and others},
  journal={arXiv preprint arXiv:2505.23884}, year={2025}
}"""

_ENTRIES = (
    LayerEntry(
        "softmax_attention",
        "all keys and values, added at the end",
        softmax_attention,
        {"kv_heads": 1},
        (),
        "grows",
        None,
        "Vaswani et al. 2017, Attention is all you need",
        "https://arxiv.org/abs/1706.03762",
        _VASWANI,
    ),
    LayerEntry(
        "window_attention",
        "the last keys and values, in a ring",
        window_attention,
        {"window": 5},
        (),
        "constant",
        None,
        "Beltagy et al. 2020, Longformer: The long-document transformer",
        "https://arxiv.org/abs/2004.05150",
        _BELTAGY,
    ),
    LayerEntry(
        "linear_attention",
        "a matrix, to which each key's and value's product is added",
        linear_attention,
        {"chunk": 4},
        (),
        "constant",
        None,
        "Katharopoulos et al. 2020, Transformers are RNNs",
        "https://arxiv.org/abs/2006.16236",
        _KATHAROPOULOS,
    ),
    LayerEntry(
        "gated_linear_attention",
        "the same, and each of its rows decays as the token says",
        gated_linear_attention,
        {"rank": 3},
        (),
        "constant",
        None,
        "Yang et al. 2024, Gated linear attention transformers with hardware-efficient training",
        "https://arxiv.org/abs/2312.06635",
        _YANG_GATED,
    ),
    LayerEntry(
        "delta_rule",
        "a matrix that is corrected by what it gets wrong of each token",
        delta_rule,
        {"chunk": 4},
        (),
        "constant",
        None,
        "Schlag et al. 2021, Linear transformers are secretly fast weight programmers",
        "https://arxiv.org/abs/2102.11174",
        _SCHLAG + "\n" + _YANG_DELTA,
    ),
    LayerEntry(
        "gated_delta_rule",
        "the same, and all of it decays as the token says",
        gated_delta_rule,
        {"chunk": 4},
        (),
        "constant",
        None,
        "Yang et al. 2025, Gated delta networks: Improving Mamba2 with delta rule",
        "https://arxiv.org/abs/2412.06464",
        _YANG_GATED_DELTA,
    ),
    LayerEntry(
        "ttt_linear",
        "a linear model with LayerNorm and residual, by gradient descent on mini-batches of tokens",
        ttt_linear,
        {"mini_batch": 4},
        ("base_rate",),
        "constant",
        {"base_rate": 0.0},
        "Sun et al. 2024, Learning to (learn at test time)",
        "https://arxiv.org/abs/2407.04620",
        _SUN,
    ),
    LayerEntry(
        "ttt_mlp",
        "the same, of a network with a hidden layer",
        ttt_mlp,
        {"mini_batch": 4, "expansion": 2},
        ("base_rate",),
        "constant",
        {"base_rate": 0.0},
        "Sun et al. 2024, Learning to (learn at test time)",
        "https://arxiv.org/abs/2407.04620",
        _SUN,
    ),
    LayerEntry(
        "titans",
        "a network with a hidden layer, by gradient descent with momentum and decay that each token sets",
        titans,
        {"chunk": 4},
        ("base_rate",),
        "constant",
        {"base_rate": 0.0, "decay": False},
        "Behrouz et al. 2025, Titans: Learning to memorize at test time",
        "https://arxiv.org/abs/2501.00663",
        _BEHROUZ,
    ),
    LayerEntry(
        "titans_linear",
        "the same, of a matrix",
        titans,
        {"depth": 1, "chunk": 4},
        ("base_rate",),
        "constant",
        {"base_rate": 0.0, "decay": False},
        "Behrouz et al. 2025, Titans: Learning to memorize at test time",
        "https://arxiv.org/abs/2501.00663",
        _BEHROUZ,
    ),
    LayerEntry(
        "lact",
        "a gated network of fixed norms, by one step for each large chunk, beside attention to a window",
        lact,
        {"chunk": 4, "window": 3},
        (),
        "constant",
        None,
        "Zhang et al. 2025, Test-time training done right",
        "https://arxiv.org/abs/2505.23884",
        _ZHANG,
    ),
)


def sequence_layers() -> dict[str, LayerEntry]:
    """All sequence layers by name.

    Example:
      >>> entry = sequence_layers()["ttt_linear"]
      >>> entry.factory(width=8, heads=2, **entry.arguments).name
      'ttt_linear'
    """
    return {entry.name: entry for entry in _ENTRIES}


def markdown_table() -> str:
    """The layers as a table for the README."""
    lines = ["| name | what its state is, and how it is written | size | paper |", "|---|---|---|---|"]
    for entry in _ENTRIES:
        paper = entry.paper.split(",")[0]
        lines.append(f"| `{entry.name}` | {entry.summary} | {entry.state} | [{paper}]({entry.url}) |")
    return "\n".join(lines)
