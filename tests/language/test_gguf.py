"""GGUF files give what the Hugging Face folder gives; broken ones one clear line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors import safe_open

from cl_zoo.language import load_pretrained
from cl_zoo.language.tokenization import from_bpe

FOLDER = Path(__file__).parents[1] / "data" / "pretrained"
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(path: Path, name: str, architecture: str | None = None, quantised: bool = False, **changed: Any) -> Path:
    """A checkpoint of tests/data as a GGUF file, written with the format's own library."""
    settings = json.loads((FOLDER / name / "config.json").read_text())
    family = settings["model_type"]
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), architecture or family)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_block_count(changed.get("layers", settings["num_hidden_layers"]))
    writer.add_head_count(changed.get("heads", heads))
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(settings.get("head_dim") or settings["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    rope = settings["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_context_length(settings["max_position_embeddings"])
    if (FOLDER / name / "tokenizer.json").exists():
        tokenizer = json.loads((FOLDER / name / "tokenizer.json").read_text())
        vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
        special = {each["content"] for each in tokenizer["added_tokens"]}
        writer.add_tokenizer_model(changed.get("tokenizer", "gpt2"))
        writer.add_tokenizer_pre(changed.get("words", "gpt-2"))
        writer.add_token_list([token for token, _ in vocabulary])
        mine = changed.get("user_defined", ())  # 3 is a control token, 4 one that a user defined
        writer.add_token_types([4 if token in mine else 3 if token in special else 1 for token, _ in vocabulary])
        if "no_merges" not in changed:
            writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
        writer.add_eos_token_id(2)
        writer.add_chat_template((FOLDER / name / "chat_template.jinja").read_text())
    for file in sorted((FOLDER / name).glob("*.safetensors")):
        with safe_open(str(file), framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(key)
                *_, part, kind = key.split(".")
                if family == "llama" and part in ("q_proj", "k_proj"):  # as the format's converter orders them
                    n = heads if part == "q_proj" else kv_heads
                    values = values.reshape((n, 2, -1, *values.shape[1:])).swapaxes(1, 2).reshape(values.shape)
                to = WHOLE.get(key) or f"blk.{key.split('.')[2]}.{PARTS[part]}.{kind}"
                if quantised and to == "token_embd.weight":
                    values = np.pad(values, ((0, 0), (0, 16)))  # 32 numbers make a block
                    kind = gguf.GGMLQuantizationType.Q8_0
                    writer.add_tensor(to, gguf.quants.quantize(values, kind), raw_dtype=kind)
                else:
                    writer.add_tensor(to, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_what_the_folder_gives(name: str, tmp_path: Path) -> None:
    folder, file = load_pretrained(FOLDER / name), load_pretrained(write(tmp_path / "model.gguf", name))
    assert file.config._replace(epsilon=0, theta=0) == folder.config._replace(epsilon=0, theta=0)
    np.testing.assert_allclose([file.config.epsilon, file.config.theta], [folder.config.epsilon, folder.config.theta])
    jax.tree.map(np.testing.assert_array_equal, file.params, folder.params)
    if folder.tokenizer is not None:
        assert file.tokenizer is not None
        for text in ("the cat sat on the mat", "it's 12 o'clock", "<|im_start|>user\nüber<|im_end|>"):
            assert file.tokenizer.encode(text) == folder.tokenizer.encode(text)
            assert file.tokenizer.decode(file.tokenizer.encode(text)) == folder.tokenizer.decode(
                folder.tokenizer.encode(text)
            )
        message = [{"role": "user", "content": "is the cat back?"}]
        assert file.tokenizer.chat(message) == folder.tokenizer.chat(message)
        assert file.tokenizer.stop == folder.tokenizer.stop == (2,)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def cut_within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_kind(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])


def lie_about_tensors(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<Q", 1 << 60) + data[16:])


def lie_about_settings(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:16] + struct.pack("<Q", 1 << 60) + data[24:])


def lie_about_a_name(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:24] + struct.pack("<Q", 1 << 60) + data[32:])


@pytest.mark.parametrize(
    "spoil", [cut, cut_within_the_header, empty, another_kind, lie_about_tensors, lie_about_settings, lie_about_a_name]
)
def test_broken_files_give_one_clear_line(spoil: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama")
    spoil(path)
    with pytest.raises(ValueError, match=r"not a (complete )?GGUF file|cut off") as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architecture": "gpt2"}, "architecture is 'gpt2'"),
        ({"layers": 1 << 30}, "num_hidden_layers"),
        ({"layers": 3}, "missing, the first of them model.layers.2"),
        ({"tokenizer": "llama"}, "tokenizer is 'llama'"),
        ({"words": "klingon"}, "splits words as 'klingon'"),
        ({"no_merges": True}, "merges must be a list, each a str"),
        ({"heads": [4, 4]}, "head_count is"),
        ({"quantised": True}, "model.embed_tokens.weight has the shape"),
    ],
)
def test_what_is_not_supported_is_named(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load_pretrained(write(tmp_path / "model.gguf", "llama", **changed))


def test_biases_that_the_settings_do_not_tell_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place in this decoder"):
        load_pretrained(write(tmp_path / "model.gguf", "llama_linear"))


def test_tokens_that_a_user_defined_stay_whole(tmp_path: Path) -> None:
    loaded = load_pretrained(write(tmp_path / "model.gguf", "llama", user_defined=("<|im_start|>",)))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("<|im_start|>cat")[0] == 1
    assert loaded.tokenizer.decode([1]) == "<|im_start|>"  # it is no special one
    assert loaded.tokenizer.decode([2]) == ""


@pytest.mark.parametrize(("words", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_llama_takes_words_that_are_tokens_whole(words: str, whole: bool) -> None:
    letters = list("helo")
    made = from_bpe([*letters, "hello", "he"], ["h e"], [], [], words, stop=(), template=None, names={})
    assert (made.encode("hello") == [4]) == whole


def test_qwen_normalises_what_is_composed() -> None:
    bytes_of = [chr(c) for c in (0xC3, 0xA9)]  # of e with an accent, as byte-level BPE writes them
    made = from_bpe([*bytes_of, "e"], [], [], [], "qwen2", stop=(), template=None, names={})
    assert made.encode("e\u0301") == made.encode("\u00e9") == [0, 1]
