"""Published checkpoints: the same answers as `transformers`, and one clear line where a file is not what it says.

The checkpoints and the answers are made by tests/data/make_pretrained.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, supervised
from cl_zoo.language import DecoderConfig, answering, config_of, load_pretrained, save_pretrained
from cl_zoo.language.config import settings_of
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import Example, skills
from cl_zoo.wrappers import lora
from tests.tiny import same_bytes

FOLDER = Path(__file__).parents[1] / "data" / "pretrained"
NAMES = ("llama", "llama_scaled", "llama_linear", "qwen2", "qwen3")


def answers(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / name / "answers.npz", allow_pickle=False) as found:
        return found["tokens"], found["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    loaded = load_pretrained(FOLDER / name)
    tokens, wanted = answers(name)
    logits, _, _ = jax.jit(lambda p, x: loaded.decoder.model.apply(p, {}, x))(loaded.params, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    cache = loaded.decoder.start(loaded.params, 2, 40)
    h, cache = loaded.decoder.extend(loaded.params, cache, tokens[:, :-1])
    last = loaded.decoder.logits(loaded.params, h)
    np.testing.assert_allclose(last, wanted[:, :-1], rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    last, _ = loaded.decoder.step(loaded.params, cache, tokens[:, -1])
    np.testing.assert_allclose(last, wanted[:, -1], rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again_is_the_same(name: str, tmp_path: Path) -> None:
    loaded = load_pretrained(FOLDER / name)
    save_pretrained(tmp_path, loaded.params, loaded.config, tokenizer=loaded.tokenizer)
    again = load_pretrained(tmp_path)
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert (again.tokenizer is None) == (name != "llama")


@pytest.mark.skipif(not os.environ.get("CL_ZOO_PEER"), reason="CL_ZOO_PEER names no Python that has transformers")
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_by_transformers_is_the_same(name: str, tmp_path: Path) -> None:
    import subprocess

    loaded = load_pretrained(FOLDER / name)
    save_pretrained(tmp_path, loaded.params, loaded.config)
    script = (
        "import sys, numpy as np, torch; from transformers import AutoModelForCausalLM\n"
        "a = np.load(sys.argv[2]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(np.abs(m(torch.tensor(a['tokens']).long()).logits.detach().numpy() - a['logits']).max())"
    )
    arguments = [os.environ["CL_ZOO_PEER"], "-c", script, str(tmp_path), str(FOLDER / name / "answers.npz")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-5


def test_weights_in_bfloat16(tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    shutil.copytree(FOLDER / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in load_file(path).items()}, path)
    half = load_pretrained(tmp_path / "llama", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(ml_dtypes.bfloat16)}
    mixed = load_pretrained(tmp_path / "llama", dtype=jnp.bfloat16, weights_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.params)} == {np.dtype(np.float32)}
    wide = load_pretrained(tmp_path / "llama")
    tokens, wanted = answers("llama")
    logits = wide.decoder.model.apply(wide.params, {}, tokens)[0]
    assert np.abs(logits - wanted).mean() < 0.05 * np.abs(wanted).mean()


def settings(**changed: Any) -> dict[str, Any]:
    return json.loads((FOLDER / "llama" / "config.json").read_text()) | changed


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_back(name: str) -> None:
    config = config_of(json.loads((FOLDER / name / "config.json").read_text()))
    assert isinstance(config, DecoderConfig)
    assert config_of(json.loads(json.dumps(settings_of(config)))) == config


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 18, "head_dim": None}, "hidden_size is 18"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ],
)
def test_unsupported_settings_are_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(settings(**changed))


def break_shape(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(settings(intermediate_size=25)))


def take_a_tensor(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(settings(num_hidden_layers=3)))


def leave_a_tensor(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(settings(num_hidden_layers=1)))


def tell_of_far_more(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(settings(num_hidden_layers=1 << 24)))


def tell_of_wide_ones(folder: Path) -> None:
    wide = {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "num_attention_heads": 1 << 20}
    (folder / "config.json").write_text(json.dumps(settings(**wide, num_key_value_heads=1, head_dim=None)))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def lie_about_offsets(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"][1] += 1 << 40
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


def not_finite(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = np.nan
    save_file(tensors, path)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.system, ("touch exploded",))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def outside(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_shard_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer_is_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_shape, "mlp.*has the shape"),
        (tell_of_far_more, "16777216 blocks"),
        (tell_of_wide_ones, "has the shape"),
        (take_a_tensor, "missing, the first of them model.layers.2"),
        (leave_a_tensor, "no place in this decoder, the first of them model.layers.1"),
        (cut, "not a complete safetensors file"),
        (lie_about_the_header, "not a complete safetensors file"),
        (lie_about_offsets, "not a complete safetensors file"),
        (not_finite, "lm_head.weight holds numbers that are not finite"),
        (pickled, "pytorch_model.bin is a pickle"),
        (pickle_in_disguise, "not a complete safetensors file"),
        (no_config, "no config.json"),
        (config_is_no_json, "is not JSON"),
        (config_is_a_list, "must be an object"),
        (outside, "must lie in the folder itself"),
        (a_shard_is_missing, "model-00001-of-00002.safetensors is missing"),
        (tokenizer_is_broken, "is not a tokenizer"),
    ],
)
def test_broken_checkpoints_give_one_clear_line(
    spoil: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "llama", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=words) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="does not end in .gguf"):
        load_pretrained(tmp_path / "weights.bin")


def test_a_saved_tokenizer_reads_and_ends_as_before(tmp_path: Path) -> None:
    loaded = load_pretrained(FOLDER / "llama")
    assert loaded.tokenizer is not None
    save_pretrained(tmp_path, loaded.params, loaded.config, tokenizer=loaded.tokenizer)
    again = load_pretrained(tmp_path).tokenizer
    assert again is not None
    text = "the cat sat on 12 mats."
    assert again.encode(text) == loaded.tokenizer.encode(text)
    assert again[1:] == loaded.tokenizer[1:]
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the config may read the weights"
    with pytest.raises(ValueError, match="tokenizer is 'llama', but it must be a TextTokenizer"):
        save_pretrained(tmp_path, loaded.params, loaded.config, tokenizer="llama")  # type: ignore[arg-type]


def test_published_weights_cannot_be_forgotten_or_of_another_net() -> None:
    loaded = load_pretrained(FOLDER / "llama")
    model, key, x = loaded.decoder.model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    for forgetful in (model, lora(model, 2)):
        with pytest.raises(ValueError, match=r"learner\.bind\(loaded\.params\)"):
            forgetful.init(key, x)
    params = loaded.params
    for wrong, words in (
        (params | {"embedding": params["embedding"][:-1]}, "'embedding' has the shape"),
        (
            params | {"embedding": params["embedding"].astype(int)},
            "'embedding' is int64, but it must be floating point",
        ),
        ({name: value for name, value in params.items() if name != "norm"}, "have no 'norm/scale'"),
        (params | {"more": params["norm"]}, "have 'more/scale', for which the model has no place"),
    ):
        with pytest.raises(ValueError, match=words):
            model.bind(wrong).init(key, x)
    begun, _ = model.bind(params).init(key, x)
    same_bytes(begun, params)
    assert begun["embedding"] is not params["embedding"], "training must leave the caller's alone"


def test_a_folder_around_a_gguf_file_and_types_that_are_no_floats(tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="give its file it.gguf instead"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_dtype is .*int8.*floating point"):
        load_pretrained(FOLDER / "llama", weights_dtype=jnp.int8)


def test_weights_are_saved_back_into_their_folder(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "llama", tmp_path / "it")
    loaded = load_pretrained(tmp_path / "it")
    changed = loaded.params | {"embedding": loaded.params["embedding"] + 1}
    save_pretrained(tmp_path / "it", changed, loaded.config, tokenizer=loaded.tokenizer)
    np.testing.assert_array_equal(load_pretrained(tmp_path / "it").params["embedding"], changed["embedding"])


def test_parameters_of_another_shape_are_not_saved(tmp_path: Path) -> None:
    loaded = load_pretrained(FOLDER / "llama")
    with pytest.raises(
        ValueError, match=r"save_pretrained: the weights' 'blocks/.*' has the shape \(2, .*but it must be \(3,"
    ):
        save_pretrained(tmp_path, loaded.params, loaded.config._replace(layers=3))
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_still_numpy_arrays_serve_a_learner() -> None:
    loaded = load_pretrained(FOLDER / "llama")
    one = Example([1, 2], [3, 1, 2], [4, 5])
    stream = skills([{"train": [one] * 2, "test": [one]}], vocabulary=loaded.config.vocabulary, steps=1, batch_size=2)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    model = lora(answering(loaded.decoder), 2)
    learner = compose(model, optax.adam(1e-3), supervised(next_token_loss), tasks=stream.tasks).bind(loaded.params)
    state = learner.init(jax.random.key(0), batch)
    eager = learner.predict(state, batch.x)
    np.testing.assert_allclose(jax.jit(lambda x: learner.predict(state, x))(batch.x), eager, atol=1e-5)
