"""Text as a stream of domains: bytes in, the next bytes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, Range, checked
from cl_zoo.datasets.text import python_library
from cl_zoo.losses import next_token_loss, reads_ignored
from cl_zoo.streams.arrays import Joint, array_stream, scenario_tasks
from cl_zoo.types import Array, Batch, Key, Stream

__all__ = ["TextData", "text_domains"]

_SPLITS = ("train", "validation", "test")


class TextData(NamedTuple):
    """Attributes:
    text: `uint8[N]`, all domains one after another.
    start, size: `i32[3, T]`, where the part of each split and task begins, and its bytes.
    """

    text: Array
    start: Array
    size: Array


@checked
def text_domains(
    domains: Mapping[str, bytes] | None = None,
    *,
    length: Count = 256,
    steps: int = 1000,
    batch_size: Count = 32,
    held_out: Annotated[float, Range(0, 1)] = 0.1,
    validation: Annotated[float, Range(0, 1)] = 0.0,
    joint: Joint | None = None,
    task_ids: bool = False,
    key: Key | None = None,
    **options: Any,
) -> Stream:
    """One task for each domain of text; an example is a window of it, each byte predicted from those before.

        x = b_o ... b_{o + L - 1},     y = b_{o + 1} ... b_{o + L}

    For training, o is every position once in an epoch, in random order, so windows overlap. Validation and test windows
    follow each other, and so score every byte but the first once; less than a window is left over. Windows never reach
    into another domain or split.

    Args:
      domains: text by name, in the order of the tasks; None takes `python_library()`: code, then docstrings. See
        `read_text_domains` for local files.
      length: L, at least 1.
      steps: batches per task.
      batch_size: windows per batch.
      held_out: fraction of each domain, its last bytes, for testing, above 0.
      validation: fraction of each domain, before those, for validation; together less than 1.
      joint: None, "all" or "seen", see `array_stream`.
      task_ids: whether examples carry their domain.
      key: draws the order of the domains; None keeps it.
      **options: `updates_per_batch`, `sample_size` (256), `sample_batch` (32) and `evaluation_batch` (32), see
        `array_stream`.

    Returns:
      A `Stream` with x and y `i32[B, L]` below 256, and 256 outputs at each position, all of them active. Batches are
      computed from the cursor. The score is minus the bits per byte of a window, so that higher is better, as for all
      metrics. Learn it with `supervised(next_token_loss)`. `reorder` shuffles the domains over the tasks.

    Raises:
      ValueError: an impossible value, named; or a domain that is too small.

    Source: bytes as tokens: Graves 2013, arXiv 1308.0850.

    Example:
      >>> import jax
      >>> stream = text_domains({"digits": b"0123456789" * 20, "letters": b"abcdefgh" * 20}, length=5, batch_size=2)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> [(bytes(x.tolist()), bytes(y.tolist())) for x, y in zip(batch.x, batch.y)]
      [(b'34567', b'45678'), (b'67890', b'78901')]
    """
    owner = "text_domains"
    if held_out == 0 or held_out + validation >= 1:
        raise ValueError(
            f"{owner}: held_out is {held_out:g} and validation is {validation:g}, but held_out must be above 0, and"
            " together they must be below 1"
        )
    texts = dict(python_library() if domains is None else domains)
    size = _sizes(owner, texts, held_out, validation, length, batch_size)
    # In the order of the bytes: the splits of the first domain, of the second, ...
    start = (np.cumsum(size.T) - size.T.ravel()).reshape(size.T.shape).T
    whole = np.frombuffer(b"".join(texts.values()), np.uint8)
    data = TextData(jnp.asarray(whole), jnp.asarray(start, jnp.int32), jnp.asarray(size, jnp.int32))

    def rows(data: TextData, split: str) -> Array:
        size = data.size[_SPLITS.index(split)]
        return size - length if split == "train" else jnp.maximum(size - 1, 0) // length

    def fetch(data: TextData, split: str, task: Array, index: Array) -> tuple[Array, Array]:
        index = jnp.minimum(index, rows(data, split)[task] - 1)  # examples of weight 0 stay inside their split, too
        offset = index if split == "train" else index * length
        window = jax.lax.dynamic_slice(data.text, (data.start[_SPLITS.index(split), task] + offset,), (length + 1,))
        window = window.astype(jnp.int32)
        return window[:-1], window[1:]

    def shuffle(data: TextData, key: Key) -> TextData:
        order = jax.random.permutation(key, len(texts))
        return data._replace(start=data.start[:, order], size=data.size[:, order])

    @reads_ignored
    def score(outputs: Array, batch: Batch) -> Array:
        return -next_token_loss(outputs, batch.y) / math.log(2)

    return array_stream(
        data if key is None else shuffle(data, key),
        scenario_tasks("domain", len(texts), 256),
        size=rows,
        fetch=fetch,
        largest={
            "train": int(size[0].max()) - length,
            "validation": max(int(size[1].max()) - 1, 0) // length,
            "test": (int(size[2].max()) - 1) // length,
        },
        smallest=int(size[0].min()) - length,
        steps=steps,
        batch_size=batch_size,
        joint=joint,
        task_ids=task_ids,
        reorder=shuffle,
        score=score,
        **{"sample_size": 256, "sample_batch": 32, "evaluation_batch": 32, **options},
    )


def _sizes(
    owner: str, texts: Mapping[str, bytes], held_out: float, validation: float, length: int, batch_size: int
) -> np.ndarray:
    """Bytes of each split and domain, `[3, T]`."""
    if not texts:
        raise ValueError(f"{owner}: domains is empty, but there must be at least one")
    for name, text in texts.items():
        if not isinstance(text, bytes):
            raise ValueError(f"{owner}: domain {name!r} is {type(text).__name__}, but it must be bytes; encode it")
    total = sum(map(len, texts.values()))
    if total >= 2**30:
        raise ValueError(f"{owner}: the domains have {total} bytes, but together they must have less than 2^30")
    size = np.zeros((3, len(texts)), np.int64)
    for task, (name, text) in enumerate(texts.items()):
        tested, validated = round(held_out * len(text)), round(validation * len(text))
        size[:, task] = len(text) - validated - tested, validated, tested
        least = {"train": length + batch_size, "validation": (length + 1) * (validation > 0), "test": length + 1}
        for split, needed, found in zip(_SPLITS, least.values(), size[:, task], strict=True):
            if found < needed:
                raise ValueError(
                    f"{owner}: length is {length} and batch_size is {batch_size}, but domain {name!r} has {found}"
                    f" {split} bytes of {len(text)}; there must be at least {needed}"
                )
    return size
