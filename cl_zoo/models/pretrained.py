"""Published decoders: Llama, SmolLM2, Qwen2, Qwen2.5 and Qwen3 from Hugging Face folders and GGUF files.

Only JSON, safetensors and GGUF are read. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.layers.attention import softmax_attention
from cl_zoo.layers.mixer import RotaryScaling
from cl_zoo.models.decoder import Decoder, decoder
from cl_zoo.models.gguf_files import Tensors, read_gguf
from cl_zoo.models.tokenization import TextTokenizer, load_tokenizer, optional, read_json
from cl_zoo.types import PyTree

__all__ = ["DecoderConfig", "Pretrained", "config_of", "load_pretrained", "save_pretrained"]

FAMILIES = ("llama", "qwen2", "qwen3")
LARGEST = 1 << 24  # of any one size in a config: a lying one must not lead to loops without end


class DecoderConfig(NamedTuple):
    """The shape of a published decoder.

    Attributes:
      family: "llama" (SmolLM2 is one), "qwen2" (2.5 too) or "qwen3".
      vocabulary, width, hidden, layers: V, D, the width of SwiGLU networks, blocks.
      heads, kv_heads, head_size: H, G and d.
      tied: whether the embedding also gives the logits.
      theta, scaling: of the rotary positions.
      epsilon: of all RMSNorms.
      biases: projections of attention that have one.
      context: tokens of a row that it was trained for.
    """

    family: str
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    theta: float
    scaling: RotaryScaling | None
    epsilon: float
    biases: tuple[str, ...]
    context: int

    def decoder(self, *, rematerialise: bool = False, dtype: Any = jnp.float32) -> Decoder:
        """The net; see `cl_zoo.decoder` for the arguments."""
        mixer = softmax_attention(
            self.width,
            self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            biases=self.biases,
            qk_norm=self.family == "qwen3",
            theta=self.theta,
            scaling=self.scaling,
            epsilon=self.epsilon,
        )
        return decoder(
            self.vocabulary,
            [mixer],
            layers=self.layers,
            hidden=self.hidden,
            tied=self.tied,
            rematerialise=rematerialise,
            epsilon=self.epsilon,
            dtype=dtype,
        )


class Pretrained(NamedTuple):
    """Attributes:
    config: its shape.
    decoder: the net.
    params: its weights, NumPy arrays.
    tokenizer: None where the checkpoint has none.
    """

    config: DecoderConfig
    decoder: Decoder
    params: PyTree
    tokenizer: TextTokenizer | None


def config_of(settings: dict[str, Any]) -> DecoderConfig:
    """The shape that a Hugging Face config.json describes.

    Raises:
      ValueError: one line on what is missing, out of range or not supported.
    """

    def refuse(field: str, allowed: str) -> ValueError:
        return ValueError(f"config: {field} is {settings.get(field)!r}, but only {allowed} is supported")

    def whole(field: str, otherwise: int | None = None) -> int:
        value = settings.get(field)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise ValueError(f"config: {field} is {value!r}, but it must be a whole number from 1 to {LARGEST}")
        return value

    def number(field: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"config: {field} is {value!r}, but it must be a number above 0")
        return float(value)

    family = settings.get("model_type")
    if family not in FAMILIES:
        raise refuse("model_type", ", ".join(FAMILIES))
    if settings.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "'silu'")
    for field in ("mlp_bias", "use_sliding_window", "quantization_config"):
        if settings.get(field):
            raise refuse(field, "none")
    kinds = settings.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise refuse("layer_types", "a list of 'full_attention'")
    width, heads = whole("hidden_size"), whole("num_attention_heads")
    if settings.get("head_dim") is None and family != "qwen3" and width % heads:
        raise ValueError(f"config: hidden_size is {width}, but it must be a multiple of num_attention_heads, {heads}")
    kv_heads = whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config: num_key_value_heads is {kv_heads}, but it must divide num_attention_heads, {heads}")
    rope: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        told = settings.get(field)
        if not isinstance(told, dict | None):
            raise refuse(field, "an object")
        rope |= told or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling(number("rope factor", rope.get("factor")))
    elif kind == "llama3":
        scaling = RotaryScaling(
            number("rope factor", rope.get("factor")),
            int(number("rope original_max_position_embeddings", rope.get("original_max_position_embeddings"))),
            number("rope low_freq_factor", rope.get("low_freq_factor")),
            number("rope high_freq_factor", rope.get("high_freq_factor")),
        )
    elif kind != "default":
        raise ValueError(f"config: rope_type is {kind!r}, but only default, linear and llama3 are supported")
    biases: tuple[str, ...] = ()
    if family == "qwen2":
        biases = ("query", "key", "value")
    elif settings.get("attention_bias"):
        biases = ("query", "key", "value", "output")
    return DecoderConfig(
        family=family,
        vocabulary=whole("vocab_size"),
        width=width,
        hidden=whole("intermediate_size"),
        layers=whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=whole("head_dim", 128 if family == "qwen3" else width // heads),
        tied=bool(settings.get("tie_word_embeddings", False)),
        theta=number("rope_theta", rope.get("rope_theta", settings.get("rope_theta", 10_000.0))),
        scaling=scaling,
        epsilon=number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        biases=biases,
        context=whole("max_position_embeddings", 2048),
    )


def settings_of(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a shape: `config_of(settings_of(config)) == config`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    if config.scaling is not None and config.scaling.original_length is None:
        rope |= {"rope_type": "linear", "factor": config.scaling.factor}
    elif config.scaling is not None:
        names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        rope |= {"rope_type": "llama3"} | dict(zip(names, config.scaling))
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [architecture[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.theta,
        "rope_scaling": None if config.scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": "output" in config.biases or config.family == "qwen2",
        "max_position_embeddings": config.context,
        "torch_dtype": "float32",
    }


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


def load_pretrained(
    path: str | Path, *, rematerialise: bool = False, dtype: Any = jnp.float32, weights_dtype: Any = None
) -> Pretrained:
    """A published decoder from a local folder or GGUF file.

    Args:
      path: a folder with config.json and model.safetensors, or its shards with model.safetensors.index.json, and
        tokenizer.json if there is one; or a file whose name ends in .gguf.
      rematerialise: see `cl_zoo.decoder`.
      dtype: of activations.
      weights_dtype: None is `dtype`. Weights that will be trained should be float32: bfloat16 cannot tell most steps
        from nothing.

    Returns:
      A `Pretrained`. Weights are NumPy arrays, so that the caller decides where they go.

    Raises:
      ValueError: one line on what is missing, broken, of the wrong shape or not supported.
      ImportError: the extra "language" is not installed.

    Example:
      >>> from cl_zoo import load_pretrained
      >>> loaded = load_pretrained("tests/data/pretrained/llama")
      >>> loaded.params["embedding"].shape == (loaded.config.vocabulary, loaded.config.width)
      True
    """
    path = Path(path)
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
            raise ValueError(f"{path} has no config.json")
        config = config_of(read_json(path / "config.json"))
        tensors = _open_safetensors(path)
        if (path / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(path)
    net = config.decoder(rematerialise=rematerialise, dtype=dtype)
    params = _assemble(path, net, config, tensors, dtype if weights_dtype is None else weights_dtype)
    return Pretrained(config, net, params, tokenizer)


def _assemble(
    path: Path,
    net: Decoder,
    config: DecoderConfig,
    tensors: Tensors,
    dtype: Any,
) -> PyTree:
    """The parameters that the net wants, from the tensors there are."""
    if config.layers > len(tensors.names):
        raise ValueError(
            f"{path}: config.json tells of {config.layers} blocks, but there are only {len(tensors.names)} tensors"
        )
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted, _ = jax.eval_shape(net.model.init, jax.random.key(0), tokens)
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
    # All shapes before any memory: a lying config must not take it all.
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
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error

    def tensor(name: str) -> np.ndarray:
        found = np.asarray(where[name].get_tensor(name))
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(f"{folder}: {name} is {found.dtype}, but only floating point weights are supported")
        return found

    return Tensors(frozenset(where), lambda name: tuple(where[name].get_slice(name).get_shape()), tensor)


def save_pretrained(
    folder: str | Path, params: PyTree, config: DecoderConfig, *, tokenizer_from: str | Path | None = None
) -> None:
    """Writes config.json and model.safetensors, which `load_pretrained` and other libraries read.

    Args:
      folder: made if it is not there; weights and config in it are replaced, each only when it is written whole.
      params: of the decoder.
      config: its shape.
      tokenizer_from: a folder whose tokenizer's files are copied.

    Raises:
      ValueError: parameters that are not those of the config.
    """
    library = optional("safetensors.numpy")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted, _ = jax.eval_shape(config.decoder().model.init, jax.random.key(0), tokens)
    shapes = jax.tree.map(jnp.shape, wanted), jax.tree.map(jnp.shape, params)
    if shapes[0] != shapes[1]:
        raise ValueError("save_pretrained: the parameters do not have the tree and shapes that the config describes")
    tensors: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        place, array = _place(_path(keys)), np.asarray(leaf)
        blocks = enumerate(array) if "{}" in place.name else [(0, array)]
        for i, one in blocks:
            tensors[place.name.format(i)] = np.ascontiguousarray(one.T if place.turned else one)
    partial = folder / "model.safetensors.partial"
    library.save_file(tensors, str(partial), metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(settings_of(config), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "config.json")
    if tokenizer_from is not None and Path(tokenizer_from).resolve() != folder.resolve():
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
        for name in names:
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, folder / name)
