"""Published decoders: Llama, SmolLM2, Qwen2, Qwen2.5 and Qwen3 from Hugging Face folders and GGUF files.

Only JSON, safetensors and GGUF are read. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import check_weights, checked
from cl_zoo.files import write_json
from cl_zoo.language._decoder import Decoder
from cl_zoo.language._extra import optional
from cl_zoo.language.config import DecoderConfig, config_of, settings_of
from cl_zoo.language.gguf_files import Tensors, read_gguf
from cl_zoo.language.tokenization import TextTokenizer, load_tokenizer, read_json
from cl_zoo.types import Key, PyTree

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]


class Pretrained(NamedTuple):
    """Attributes:
    config: its shape.
    decoder: the network; it does not initialise weights, so that those below cannot be forgotten.
    params: its weights, NumPy arrays.
    tokenizer: None where the checkpoint has none.
    """

    config: DecoderConfig
    decoder: Decoder
    params: PyTree
    tokenizer: TextTokenizer | None


class _Place(NamedTuple):
    """Where a leaf of the parameters lies in a checkpoint: the tensor's name ({} is the block), and whether a kernel is
    stored `[out, in]`."""

    name: str
    turned: bool = False


def _place(path: tuple[str, ...]) -> _Place:
    match path:
        case ("embedding",):
            return _Place("model.embed_tokens.weight")
        case ("norm", "scale"):
            return _Place("model.norm.weight")
        case ("head",):
            return _Place("lm_head.weight", True)
        case ("blocks", _, "mixer_norm", "scale"):
            return _Place("model.layers.{}.input_layernorm.weight")
        case ("blocks", _, "ffn_norm", "scale"):
            return _Place("model.layers.{}.post_attention_layernorm.weight")
        case ("blocks", _, "ffn", name):
            return _Place(f"model.layers.{{}}.mlp.{name}_proj.weight", True)
        case ("blocks", _, "mixer", "bias", name):
            return _Place(f"model.layers.{{}}.self_attn.{_LETTERS[name]}_proj.bias")
        case ("blocks", _, "mixer", ("query_norm" | "key_norm") as name, "scale"):
            return _Place(f"model.layers.{{}}.self_attn.{name[0]}_norm.weight")
        case ("blocks", _, "mixer", name):
            return _Place(f"model.layers.{{}}.self_attn.{_LETTERS[name]}_proj.weight", True)
    raise AssertionError(path)


_LETTERS = {"query": "q", "key": "k", "value": "v", "output": "o"}


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


@checked
def load_pretrained(
    path: str | Path, *, rematerialise: bool = False, dtype: Any = jnp.float32, weights_dtype: Any = None
) -> Pretrained:
    """A published decoder from a local folder or GGUF file.

    Args:
      path: a folder with config.json and model.safetensors, or its shards with model.safetensors.index.json, and
        tokenizer.json if there is one; or a file whose name ends in .gguf.
      rematerialise: see `cl_zoo.decoder`.
      dtype: of activations.
      weights_dtype: None is `dtype`. Weights that will be trained should be float32: bfloat16 rounds most steps
        to nothing.

    Returns:
      A `Pretrained`. Weights are NumPy arrays, so that the caller decides where they go.

    Raises:
      ValueError: one line on what is missing, broken, of the wrong shape or not supported.
      ImportError: the extra "language" is not installed.

    Example:
      >>> from cl_zoo.language import load_pretrained
      >>> loaded = load_pretrained("tests/data/pretrained/llama")
      >>> loaded.params["embedding"].shape == (loaded.config.vocabulary, loaded.config.width)
      True
    """
    path, weights_dtype = Path(path), dtype if weights_dtype is None else weights_dtype
    for field, kind in (("dtype", dtype), ("weights_dtype", weights_dtype)):
        if not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(f"load_pretrained: {field} is {kind}, but it must be a floating point type")
    if not path.exists():
        raise ValueError(f"{path} does not exist; weights are read from a local folder or .gguf file")
    tokenizer = None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file that does not end in .gguf; give the folder that holds config.json")
        file = read_gguf(path)
        config, tensors, tokenizer = config_of(file.settings), file.tensors, file.tokenizer()
    else:
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            raise ValueError(f"{path} has no config.json" + (f"; give its file {files[0]} instead" if files else ""))
        config = config_of(read_json(path / "config.json"))
        tensors = _open_safetensors(path)
        if (path / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(path)
    net = config.decoder(rematerialise=rematerialise, dtype=dtype)
    params = _assemble(path, net, config, tensors, weights_dtype)

    def init(key: Key, x: PyTree, weights: PyTree = None) -> tuple[PyTree, PyTree]:
        if weights is None:
            raise ValueError(
                "load_pretrained: this decoder begins from the published weights, so bind them:"
                " learner.bind(loaded.params); for a new one of its shape take loaded.config.decoder()"
            )
        return net.model.bind(weights).init(key, x)

    model = dataclasses.replace(net.model, init_function=init, takes_weights=True)
    return Pretrained(config, net._replace(model=model), params, tokenizer)


def _shapes(net: Decoder) -> PyTree:
    """Of its parameters."""
    return jax.eval_shape(net.model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))[0]


def _assemble(
    path: Path,
    net: Decoder,
    config: DecoderConfig,
    tensors: Tensors,
    dtype: Any,
) -> PyTree:
    """The parameters that the network needs, from the tensors there are."""
    if config.layers > len(tensors.names):
        raise ValueError(
            f"{path}: config.json has {config.layers} blocks, but there are only {len(tensors.names)} tensors"
        )
    wanted = _shapes(net)
    leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
    places: list[tuple[_Place, list[str], tuple[int, ...]]] = []
    for keys, leaf in leaves:
        place, inner = _place(_path(keys)), keys[0].key == "blocks"
        own = [place.name.format(i) for i in range(config.layers)] if inner else [place.name]
        places.append((place, own, leaf.shape[1:] if inner else leaf.shape))
    expected = {name for _, own, _ in places for name in own}
    ignored = ("rotary_emb.inv_freq", *(("lm_head.weight",) if config.tied else ()))
    if missing := sorted(expected - tensors.names):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first of them {missing[0]}")
    if extra := sorted(name for name in tensors.names - expected if not name.endswith(ignored)):
        raise ValueError(f"{path}: {len(extra)} tensors have no place in this decoder, the first of them {extra[0]}")
    # All shapes before any memory: a false config must not exhaust it.
    for place, own, shape in places:
        stored = shape[::-1] if place.turned else shape
        for name in own:
            if (found := tensors.shape(name)) != stored:
                raise ValueError(f"{path}: {name} has the shape {list(found)}, but the config makes it {list(stored)}")
    made = []
    for (place, own, _), (_, leaf) in zip(places, leaves, strict=True):
        array = np.empty(leaf.shape, dtype)
        for name, to in zip(own, array if "{}" in place.name else [array], strict=True):
            values = tensors.read(name)
            if not np.isfinite(values).all():
                raise ValueError(f"{path}: {name} holds numbers that are not finite")
            to[...] = values.T if place.turned else values
        made.append(array)
    return jax.tree_util.tree_unflatten(tree, made)


def _open_safetensors(folder: Path) -> Tensors:
    library = optional("safetensors")
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    single = folder / "model.safetensors"
    if single.is_file():
        files = {single}
    elif isinstance(index, dict):
        files = set()
        for name in set(index.values()):
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder}: the index names the file {name!r}, but it must lie in the folder itself")
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: the shard {name} is missing")
            files.add(folder / name)
    else:
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
        told = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        raise ValueError(f"{folder} has no model.safetensors and no index of shards{told}")
    where: dict[str, Any] = {}
    for file in sorted(files):
        try:
            opened = library.safe_open(str(file), framework="flax")
            for name in sorted(opened.keys()):
                if name in where:
                    raise ValueError(f"{folder}: {name} is in more than one shard")
                where[name] = opened
        except library.SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error

    def tensor(name: str) -> np.ndarray:
        found = np.asarray(where[name].get_tensor(name))
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(f"{folder}: {name} is {found.dtype}, but only floating point weights are supported")
        return found

    return Tensors(frozenset(where), lambda name: tuple(where[name].get_slice(name).get_shape()), tensor)


@checked
def save_pretrained(
    folder: str | Path, params: PyTree, config: DecoderConfig, *, tokenizer: TextTokenizer | None = None
) -> None:
    """Writes config.json and model.safetensors, which `load_pretrained` and other libraries read.

    Args:
      folder: made if it is not there; weights and config in it are replaced, each only when it is written whole.
      params: of the decoder.
      config: its shape.
      tokenizer: written too, with its template and the tokens that end an answer, if it is given.

    Raises:
      ValueError: parameters that are not those of the config, which are named; a tokenizer of another kind.
    """
    library = optional("safetensors.numpy")
    if not isinstance(tokenizer, TextTokenizer | None):
        raise ValueError(f"save_pretrained: tokenizer is {type(tokenizer).__name__}, but it must be a TextTokenizer")
    check_weights("save_pretrained", params, _shapes(config.decoder()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        place, array = _place(_path(keys)), np.asarray(leaf)
        blocks = enumerate(array) if "{}" in place.name else [(0, array)]
        for i, one in blocks:
            tensors[place.name.format(i)] = np.ascontiguousarray(one.T if place.turned else one)
    write_json(folder / "config.json", settings_of(config))
    partial = folder / "model.safetensors.partial"
    library.save_file(tensors, str(partial), metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", partial)  # the library makes it readable by its owner only
    partial.replace(folder / "model.safetensors")
    if tokenizer is not None:
        partial = folder / "tokenizer.json.partial"
        tokenizer.backend.save(str(partial))
        partial.replace(folder / "tokenizer.json")
        template = {} if tokenizer.template is None else {"chat_template": tokenizer.template}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / "tokenizer_config.json", kind | dict(tokenizer.words) | template)
        write_json(folder / "generation_config.json", {"eos_token_id": list(tokenizer.stop)})
