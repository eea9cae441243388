import gzip
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import cl_zoo
from cl_zoo.datasets import load_digits
from cl_zoo.datasets.images import read_idx
from tests.tiny_tfds import write_images

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bytes(array, magic=None, shape=None):
    """An idx file, with another magic number or announcing another shape if told to."""
    shape = array.shape if shape is None else shape
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.tobytes()


def write(folder, name, content, compress):
    path = folder / (f"{name}.gz" if compress else name)
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    pieces = []
    for n in (13, 5):
        pieces += [random.integers(0, 256, (n, 28, 28)).astype(np.uint8), random.integers(0, 10, n).astype(np.uint8)]
    return pieces


@pytest.fixture(params=["plain", "gz"])
def compress(request):
    return request.param == "gz"


@pytest.fixture
def folder(tmp_path, arrays, compress):
    """The four files."""
    names = (IMAGES, LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name, array in zip(names, arrays, strict=True):
        write(tmp_path, name, idx_bytes(array), compress)
    return tmp_path


def refusal(folder, kind=ValueError):
    """The one line with which the folder is refused."""
    with pytest.raises(kind) as error:
        load_digits(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_embedded_digits():
    images = load_digits()
    assert images.train_images.shape == (10000, 28, 28) and images.test_images.shape == (2000, 28, 28)
    assert images.train_images.dtype == images.test_images.dtype == np.uint8
    assert np.bincount(images.train_labels).tolist() == [1000] * 10
    assert np.bincount(images.test_labels).tolist() == [200] * 10
    assert images.train_images.max() == 255 and images.train_images.min() == 0


def test_embedded_digits_differ_from_each_other():
    images = load_digits()
    found = {image.tobytes() for image in (*images.train_images, *images.test_images)}
    assert len(found) == 12000


def test_files_come_back_as_written(folder, arrays):
    for found, written in zip(load_digits(folder), arrays, strict=True):
        np.testing.assert_array_equal(found, written)
        assert found.dtype == np.uint8


def test_a_folder_may_be_named_by_text_or_by_path(folder):
    for data_dir, source in ((str(folder), None), (Path(folder), "idx")):
        assert load_digits(data_dir, source).train_images.shape == (13, 28, 28)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_read_idx_of_any_dimensions(dimensions, tmp_path, compress):
    array = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 5)[:dimensions]).astype(np.uint8)
    np.testing.assert_array_equal(read_idx(write(tmp_path, "some", idx_bytes(array), compress), dimensions), array)


@pytest.mark.parametrize("magic", [0x00000801, 0x00000903, 0x1F8B0803, 0x00000000])
def test_wrong_magic_number(magic, folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0], magic=magic), compress)
    message = refusal(folder)
    assert str(path) in message and f"0x{magic:08x}" in message and "0x00000803" in message
    assert "another kind of file" in message


@pytest.mark.parametrize("keep", [0, 3, 4, 11, 15])
def test_truncated_header(keep, folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0])[:keep], compress)
    message = refusal(folder)
    assert str(path) in message
    if keep >= 4:
        assert "truncated" in message and "again" in message


@pytest.mark.parametrize("missing", [1, 784, 9000])
def test_truncated_file(missing, folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0])[:-missing], compress)
    message = refusal(folder)
    for word in (str(path), str(13 * 784), f"only {13 * 784 - missing}", "again"):
        assert word in message


@pytest.mark.parametrize("count", [14, 2**20])
def test_header_announces_more_than_there_is(count, folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0], shape=(count, 28, 28)), compress)
    begun = time.monotonic()
    message = refusal(folder)
    assert time.monotonic() - begun < 5
    for word in (str(path), str(count * 784), f"only {13 * 784}", "again"):
        assert word in message


def test_header_of_more_than_is_read(folder, arrays, compress):
    """A small gzip file may unpack to anything."""
    write(folder, IMAGES, idx_bytes(arrays[0], shape=(2**32 - 1, 28, 28)), compress)
    assert "announces 3367254359280 bytes, but at most 1073741824 are read" in refusal(folder)


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**32 - 1, 0, 2**32 - 1), (0, 28, 28), (0, 0, 0)])
def test_header_of_an_absurd_shape(shape, folder, arrays, compress):
    content = arrays[0] if 0 not in shape else np.zeros((0, 0, 0), np.uint8)
    path = write(folder, IMAGES, idx_bytes(content, shape=shape), compress)
    assert path.name.removesuffix(".gz") in refusal(folder)


@pytest.mark.parametrize("extra", [1, 784, 3_000_000])
def test_extra_bytes(extra, folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0]) + bytes(extra), compress)
    message = refusal(folder)
    for word in (str(path), str(13 * 784), "more", "again"):
        assert word in message


def test_no_rows(folder, compress):
    path = write(folder, IMAGES, idx_bytes(np.zeros((0, 28, 28), np.uint8)), compress)
    write(folder, LABELS, idx_bytes(np.zeros(0, np.uint8)), compress)
    message = refusal(folder)
    assert str(path) in message and "nothing in it" in message


@pytest.mark.parametrize("label", [10, 255])
def test_label_above_nine(label, folder, arrays, compress):
    labels = arrays[1].copy()
    labels[4] = label
    path = write(folder, LABELS, idx_bytes(labels), compress)
    message = refusal(folder)
    for word in (str(path), f"label {label} in row 4", "0 to 9"):
        assert word in message


def test_another_number_of_labels_than_images(folder, arrays, compress):
    path = write(folder, LABELS, idx_bytes(arrays[1][:-1]), compress)
    message = refusal(folder)
    for word in (str(path), "12 labels", "13 images", IMAGES):
        assert word in message


def test_wrong_image_size(folder, arrays, compress):
    path = write(folder, IMAGES, idx_bytes(arrays[0][:, :, :27].copy()), compress)
    message = refusal(folder)
    for word in (str(path), "28 x 27", "28 x 28"):
        assert word in message


@pytest.mark.parametrize("name", [IMAGES, "t10k-labels-idx1-ubyte"])
def test_missing_file(name, folder, compress):
    (folder / (f"{name}.gz" if compress else name)).unlink()
    message = refusal(folder, FileNotFoundError)
    assert (
        str(folder / name) in message and ".gz" in message and "put the four MNIST idx files in that folder" in message
    )


def test_missing_folder(tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none", FileNotFoundError)


@pytest.mark.parametrize("compress", ["gz"], indirect=True)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9995])
def test_truncated_gzip(keep, folder):
    path = folder / f"{IMAGES}.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    message = refusal(folder)
    assert str(path) in message
    if keep > 0:
        assert "truncated or damaged gzip" in message and "again" in message


@pytest.mark.parametrize("compress", ["gz"], indirect=True)
@pytest.mark.parametrize("where", ["head", "middle", "checksum", "length"])
def test_damaged_gzip(where, folder):
    path = folder / f"{LABELS if where == 'middle' else IMAGES}.gz"
    content = bytearray(path.read_bytes())
    place = {"head": 0, "middle": len(content) // 2, "checksum": -8, "length": -1}[where]
    for i in range(place, place + 4) if where == "middle" else [place]:
        content[i] ^= 0xFF
    path.write_bytes(bytes(content))
    message = refusal(folder)
    assert str(path) in message and "truncated or damaged gzip" in message and "again" in message


@pytest.mark.parametrize("compress", ["gz"], indirect=True)
def test_plain_file_named_gz(folder, arrays):
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(idx_bytes(arrays[0]))
    message = refusal(folder)
    assert str(path) in message and "damaged gzip" in message


def test_unknown_source():
    with pytest.raises(ValueError, match="source is 'web'.*'embedded', 'idx', 'tfds'"):
        load_digits(source="web")


def test_idx_without_a_folder():
    with pytest.raises(ValueError, match="'idx' needs data_dir"):
        load_digits(source="idx")


def test_embedded_with_a_folder(tmp_path):
    with pytest.raises(ValueError, match="'embedded' reads no data_dir"):
        load_digits(tmp_path, "embedded")


def test_tfds_set_that_is_not_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        load_digits(tmp_path, "tfds")
    assert time.monotonic() - begun < 15
    message = str(error.value)
    assert "\n" not in message
    for word in (str(tmp_path / "mnist"), "not prepared", "download_and_prepare()", repr(str(tmp_path))):
        assert word in message
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded, or left behind"


def test_the_command_that_prepares_is_python(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as error:
        load_digits(tmp_path, "tfds")
    compile(re.search('python -c "(.*)"', str(error.value)).group(1), "command", "exec")


def test_tfds_set_that_is_prepared(tmp_path, arrays):
    """A tiny set of that name, written by TFDS itself."""
    write_images(tmp_path, "mnist", arrays[:2], arrays[2:])
    found = load_digits(tmp_path, "tfds")
    for images, labels, written, their_labels in ((*found[:2], *arrays[:2]), (*found[2:], *arrays[2:])):
        assert images.dtype == np.uint8 and images.shape == written.shape
        label_of = {image.tobytes(): label for image, label in zip(written, their_labels, strict=True)}
        assert sorted(image.tobytes() for image in images) == sorted(label_of)
        assert labels.tolist() == [label_of[image.tobytes()] for image in images]


def test_pickles_are_never_loaded():
    sources = list(Path(cl_zoo.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        text = path.read_text()
        assert not re.search(r"allow_pickle\s*=\s*(?!False\b)|\bpickle\.loads?\b|import pickle", text), path


def test_full_digits(full_digits):
    assert full_digits.train_images.shape == (60000, 28, 28) and full_digits.test_images.shape == (10000, 28, 28)
    assert full_digits.train_labels[0] == 5 and full_digits.test_labels[0] == 7
    assert np.bincount(full_digits.train_labels).tolist()[:3] == [5923, 6742, 5958]
    assert np.bincount(full_digits.test_labels).tolist()[:3] == [980, 1135, 1032]


@pytest.mark.parametrize("split", ["train", "test"])
def test_embedded_digits_are_some_of_all_digits(split, digits, full_digits):
    images, labels = (getattr(full_digits, f"{split}_{part}") for part in ("images", "labels"))
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    mine = (getattr(digits, f"{split}_{part}") for part in ("images", "labels"))
    assert all(label_of[image.tobytes()] == label for image, label in zip(*mine, strict=True))
