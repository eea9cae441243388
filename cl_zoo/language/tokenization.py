"""Text to tokens and back, for decoders whose weights come with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_zoo.checks import Count, checked
from cl_zoo.language._extra import optional
from cl_zoo.language._templates import rendered

__all__ = ["TextTokenizer", "from_bpe", "left_padded", "load_tokenizer"]


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a library makes of a broken file (the Rust one panics) as one ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300]}") from error


class TextTokenizer(NamedTuple):
    """Attributes:
    backend: a `tokenizers.Tokenizer`.
    stop: tokens that end an answer.
    template: Jinja source that turns messages into a prompt; None where the model has none.
    words: what the template may use besides the messages: "bos_token" and "eos_token".
    """

    backend: Any
    stop: tuple[int, ...]
    template: str | None
    words: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Special tokens that are written out in it are recognised, none are added."""
        with refused("the tokenizer cannot encode this text"):
            return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        with refused("the tokenizer cannot decode these tokens"):
            return str(self.backend.decode([int(token) for token in tokens], skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """The prompt that a conversation makes, by the model's own template, which runs in a sandbox.

        Args:
          messages: each with "role" ("system", "user" or "assistant") and "content".
          answer: end with the words that begin an answer.

        Raises:
          ValueError: no template; one that fails, or needs more than two seconds or a million letters; messages of
            another kind.
        """
        if isinstance(messages, (str, Mapping)) or not all(isinstance(each, Mapping) for each in messages):
            raise ValueError("chat: messages must be a list of {'role': ..., 'content': ...}")
        if self.template is None:
            raise ValueError("chat: the tokenizer has no chat template; put the prompt together as text")
        asked = {"messages": [dict(message) for message in messages], "add_generation_prompt": answer}
        with refused("chat: the model's template cannot make a prompt of these messages"):
            return rendered(self.template, {**asked, **self.words})


@checked
def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and what tokenizer_config.json, chat_template.jinja and
    generation_config.json say about it.

    Raises:
      ValueError: no tokenizer.json, or files that cannot be read.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json; other kinds of tokenizers are not read")
    library = optional("tokenizers")
    with refused(f"{path} is not a tokenizer"):
        backend = library.Tokenizer.from_file(str(path))
        backend.no_truncation()  # else texts are cut, or filled up, without a word
        backend.no_padding()
    settings = read_json(folder / "tokenizer_config.json")
    words = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        word = settings.get(name)
        word = word.get("content") if isinstance(word, dict) else word
        if isinstance(word, str):
            words[name] = word
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}.get(
            "default"
        )
    if (folder / "chat_template.jinja").is_file():
        with refused(f"{folder / 'chat_template.jinja'} is not a text"):
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ends = [backend.token_to_id(words["eos_token"])] if "eos_token" in words else []
    for name in ("generation_config.json", "config.json"):
        told = read_json(folder / name).get("eos_token_id")
        ends += told if isinstance(told, list) else [told]
    stop = tuple(sorted({end for end in ends if isinstance(end, int)}))
    if any(not 0 <= end < 2**31 for end in stop):
        raise ValueError(f"{folder}: the end tokens are {list(stop)}, but they must be numbers of tokens")
    return TextTokenizer(backend, stop, template if isinstance(template, str) else None, words)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file.

    Raises:
      ValueError: it holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, but it must be an object")
    return found


_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_WORDS = _QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def from_bpe(
    tokens: Sequence[str],
    merges: Sequence[str],
    special: Sequence[str],
    added: Sequence[str],
    words: str,
    *,
    stop: tuple[int, ...],
    template: str | None,
    names: Mapping[str, str],
) -> TextTokenizer:
    """A byte-level BPE tokenizer from its tables.

    Args:
      tokens: by number.
      merges: pairs "a b", the first joined first.
      special: tokens that text is split at, and that `decode` leaves out.
      added: others that text is split at.
      words: how text is split into words: "gpt-2", "smollm", "qwen2" or "llama-bpe".
      stop, template, names: see `TextTokenizer`.

    Raises:
      ValueError: an unknown way of splitting; tables that do not fit together.
    """
    library = optional("tokenizers")
    cut = library.pre_tokenizers
    whole = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    ways = {
        "gpt-2": lambda: cut.ByteLevel(add_prefix_space=False),
        "smollm": lambda: cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]),
        "qwen2": lambda: cut.Sequence([cut.Split(library.Regex(_QWEN_WORDS), "isolated"), whole]),
        "llama-bpe": lambda: cut.Sequence([cut.Split(library.Regex(_LLAMA_WORDS), "isolated"), whole]),
    }
    if words not in ways:
        raise ValueError(f"the tokenizer splits words as {words!r}, but only {', '.join(ways)} are known")
    with refused("the tokenizer's tables do not fit together"):
        pairs = [tuple(pair.split(" ")) for pair in merges]
        # Llama 3 keeps a word that is a token whole, whatever the merges would make of it.
        whole_words = words == "llama-bpe"
        model = library.models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=whole_words)
        backend = library.Tokenizer(model)
    if words == "qwen2":
        backend.normalizer = library.normalizers.NFC()
    backend.pre_tokenizer = ways[words]()
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([library.AddedToken(token, special=False, normalized=False) for token in added])
    return TextTokenizer(backend, stop, template, names)


@checked
def left_padded(rows: Sequence[Sequence[int]], length: Count | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of tokens in one array, for `generate` to continue: zeros before each.

    Args:
      rows: the sequences, none of them empty.
      length: P; None takes the least power of two, from 16, that holds the longest: few shapes, few compilations.

    Returns:
      `(i32[B, P], i32[B])`: the tokens, and how many zeros come before them.

    Raises:
      ValueError: no sequences, an empty one, or one longer than `length`.
    """
    for row in rows:
        if isinstance(row, str) or (not np.issubdtype(np.asarray(row).dtype, np.integer) and len(row)):
            raise ValueError(f"left_padded: a sequence is {row!r:.60}, but it must be whole numbers: encode texts")
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError("left_padded: there must be at least one sequence, and a token in each")
    if length is None:
        length = max(16, 1 << (max(lengths) - 1).bit_length())
    if max(lengths) > length:
        raise ValueError(f"left_padded: a sequence has {max(lengths)} tokens, but length is {length}")
    tokens = np.zeros((len(rows), length), np.int32)
    for to, row in zip(tokens, rows):
        to[length - len(row) :] = row
    return tokens, length - np.array(lengths, np.int32)
