"""Images and labels that a user may bring by mistake: each is refused in one line that names field, value and what is
allowed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.datasets import LabelledImages
from cl_zoo.streams import few_shot, permuted_mnist, rotated_mnist, split_mnist
from cl_zoo.streams.images import rotate

RANDOM = np.random.default_rng(0)
LABELS = np.tile(np.arange(4), 10)
PIXELS = RANDOM.integers(0, 256, (40, 6, 6)).astype(np.uint8)
COLOUR = RANDOM.integers(0, 256, (40, 3, 32, 32)).astype(np.uint8)
GOOD = LabelledImages(PIXELS, LABELS, PIXELS[:8], LABELS[:8])
SCALED = {"train_images": PIXELS / 255, "test_images": PIXELS[:8] / 255}

CARELESS: dict[str, tuple[dict[str, Any], str]] = {
    "too many labels": (
        {"train_labels": np.tile(LABELS, 2)},
        r"train_labels has the shape \(80,\), but it must be \(40,\)",
    ),
    "too few labels": ({"test_labels": LABELS[:5]}, r"test_labels has the shape \(5,\)"),
    "one-hot": ({"train_labels": np.eye(4)[LABELS]}, r"train_labels has the shape \(40, 4\)"),
    "minus one": ({"train_labels": LABELS - 1}, "train_labels has -1, but it must be whole numbers from 0"),
    "from one": ({"train_labels": LABELS + 1, "test_labels": LABELS[:8] + 1}, "train_labels has no 0"),
    "gaps": ({"train_labels": 2 * LABELS, "test_labels": 2 * LABELS[:8]}, "train_labels has no 1"),
    "255": ({"train_labels": np.where(LABELS == 3, 255, LABELS)}, "train_labels has no 3"),
    "huge": ({"train_labels": LABELS * 10**9}, "train_labels has 3000000000"),
    "fractions": ({"train_labels": LABELS + 0.5}, "train_labels is float64, but it must be whole numbers"),
    "floats": ({"train_labels": LABELS.astype(np.float32)}, "train_labels is float32"),
    "words": ({"train_labels": np.array(["cat"] * 40)}, "train_labels is <U3"),
    "booleans": ({"test_labels": LABELS[:8] > 1}, "test_labels is bool"),
    "a class of the test set alone": ({"test_labels": LABELS[:8] + 1}, "train_labels has no 4"),
    "int32": ({"train_images": PIXELS.astype(np.int32)}, "train_images is int32, but it must be uint8"),
    "uint16": ({"test_images": PIXELS[:8].astype(np.uint16)}, "test_images is uint16"),
    "not scaled": (
        {"train_images": PIXELS.astype(np.float32)},
        "train_images is float32 from 0 to 25[0-9], which is not",
    ),
    "test not scaled": (
        SCALED | {"test_images": PIXELS[:8].astype(float)},
        "test_images is float64 from .* not scaled",
    ),
    "two types": ({"test_images": PIXELS[:8] / 255}, "test_images are float64.* as train_images, uint8"),
    "two sizes": ({"test_images": PIXELS[:8, :5]}, r"test_images are uint8\[5, 6\], but .* uint8\[6, 6\]"),
    "flat": ({"train_images": PIXELS.reshape(40, 36)}, r"train_images has the shape \(40, 36\), but .*height, width"),
    "channels first": ({"train_images": COLOUR, "test_images": COLOUR[:8]}, "channels first, but they must be last"),
    "no test images": ({"test_images": PIXELS[:0], "test_labels": LABELS[:0]}, "test_images has the shape"),
    "nan": (SCALED | {"test_images": np.full((8, 6, 6), np.nan)}, "test_images is float64 from nan"),
    "infinite": (SCALED | {"train_images": PIXELS / np.where(PIXELS > 3, 255, 0.0)}, "train_images is float64 from"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CARELESS)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    changed, said = CARELESS[name]
    for make in (split_mnist, permuted_mnist, rotated_mnist):
        with pytest.raises(ValueError, match=said) as error:
            make(2, images=GOOD._replace(**changed), batch_size=4)
        assert "\n" not in str(error.value)


def test_what_is_no_data_set_is_refused() -> None:
    for given in ((PIXELS, LABELS), {"train": PIXELS}, PIXELS, "mnist"):
        with pytest.raises(ValueError, match="split_mnist: images is .*, but it must be a LabelledImages"):
            split_mnist(images=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels has the shape \(47,\), but it must be \(48,\)"):
        few_shot(GOOD._replace(test_labels=LABELS[:7]), n_way=2, queries=2)


def test_what_is_meant_is_taken() -> None:
    """Scaled and standardised floating point, jax arrays, small label types."""
    standard = {name: (value - 0.5) / 0.25 for name, value in SCALED.items()}
    for changed in (
        {},
        SCALED,
        standard,
        {"train_labels": jnp.asarray(LABELS), "train_images": jnp.asarray(PIXELS)},
        {"train_labels": LABELS.astype(np.uint8), "test_labels": LABELS[:8].astype(np.int16)},
    ):
        stream = split_mnist(2, "domain", images=GOOD._replace(**changed), batch_size=4)
        batch, _ = stream.next(stream.init(jax.random.key(0)))
        assert batch.x.shape == (4, 6, 6) and set(np.asarray(batch.y).tolist()) <= {0, 1}


def test_rotated_floats_are_not_rounded() -> None:
    image = jnp.asarray(RANDOM.random((8, 8)), jnp.float32)
    found = np.asarray(rotate(image, jnp.float32(30.0)))
    assert len(np.unique(found)) > 20 and found.dtype == np.float32
    whole = np.asarray(rotate(jnp.round(255 * image).astype(jnp.uint8), jnp.float32(30.0)))
    np.testing.assert_allclose(whole / 255, found, atol=1.1 / 255)


def test_a_task_without_test_images_scores_nan_and_says_so() -> None:
    few = GOOD._replace(test_images=PIXELS[:2], test_labels=LABELS[:2])
    with pytest.warns(UserWarning, match="task 1 has no test examples, so its score will be nan"):
        stream = split_mnist(2, "domain", images=few, batch_size=4)
    from cl_zoo.types import Agent

    agent = Agent(lambda x, task=None: jnp.zeros((x.shape[0], 2)), None)  # type: ignore[arg-type]
    scores = [float(stream.evaluate(agent, t, "test", jax.random.key(0))) for t in (0, 1)]
    assert scores[0] == 0.5 and np.isnan(scores[1])
