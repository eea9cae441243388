"""Tokenizers and chat templates of local folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cl_zoo.language import TextTokenizer, left_padded, load_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "pretrained" / "llama"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(FOLDER)


@pytest.mark.parametrize("text", ["the cat sat on the mat", "it's 12 o'clock", "über naïve café\n\n  x", "猫"])
def test_text_and_back(tokenizer: TextTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert len(tokens) <= len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_special_tokens(tokenizer: TextTokenizer) -> None:
    assert tokenizer.stop == (2,)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([1, *tokenizer.encode("cat"), 2]) == "cat"


def test_chat_is_that_of_transformers(tokenizer: TextTokenizer) -> None:
    messages = [{"role": "user", "content": "is the cat back?"}]
    assert tokenizer.chat(messages) == (FOLDER / "chat.txt").read_text()
    assert tokenizer.chat(messages, answer=False) == (FOLDER / "chat.txt").read_text().removesuffix(
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch exploded') }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_templates_run_in_a_sandbox(
    tokenizer: TextTokenizer, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="template cannot make a prompt"):
        tokenizer._replace(template=template).chat([{"role": "user", "content": "hello"}])
    assert not (tmp_path / "exploded").exists()


def test_templates_have_what_others_have(tokenizer: TextTokenizer) -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson(ensure_ascii=True) }}"
    said = tokenizer._replace(template=template + "{% endfor %}").chat([{"content": "é"}, {"content": "x"}])
    assert said == '{"content": "\\u00e9"}'


def test_no_template(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer._replace(template=None).chat([])


def test_template_within_the_settings(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "it")
    (tmp_path / "it" / "chat_template.jinja").unlink()
    path = tmp_path / "it" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"chat_template": [{"name": "default", "template": "{{ eos_token }}!"}]}
    settings |= {"eos_token": {"content": "<|endoftext|>"}}
    path.write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path / "it")
    assert found.chat([]) == "<|endoftext|>!"
    assert 0 in found.stop


def test_left_padded() -> None:
    tokens, padding = left_padded([[5], [1, 2, 3]], 4)
    np.testing.assert_array_equal(tokens, [[0, 0, 0, 5], [0, 1, 2, 3]])
    np.testing.assert_array_equal(padding, [3, 1])
    assert left_padded([[1] * 16])[0].shape == (1, 16)
    assert left_padded([[1] * 17])[0].shape == (1, 32)
    for rows, length in (([], None), ([[]], None), ([[1, 2]], 1), (["a cat"], None), ([[1.7]], None)):
        with pytest.raises(ValueError, match="left_padded"):
            left_padded(rows, length)  # type: ignore[arg-type]
