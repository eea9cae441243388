"""Small sets of images under the names of published ones, written by TensorFlow Datasets itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["write_images"]


def write_images(folder: Path, named: str, train: tuple[Any, Any], test: tuple[Any, Any]) -> None:
    """Images `uint8[N, 28, 28]` and labels below 10 of both splits. Skips the test where a package is missing."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    pillow = pytest.importorskip("PIL.Image")

    def png(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        pillow.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc,name-defined]
        name = named
        VERSION = tfds.builder(named, data_dir=folder).version

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples(*train), "test": self._generate_examples(*test)}

        def _generate_examples(self, images: Any, labels: Any) -> Any:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": png(image), "label": int(label)}

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
