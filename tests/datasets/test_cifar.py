import io

import numpy as np
import pytest

from cl_zoo.datasets import load_cifar10, load_cifar10_c

BINARY = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
RECORD = 3073


def write_binary(path, rows):
    """A file of the right size, of zeros but for some rows `{row: (label, image)}`; the zeros take no room."""
    with open(path, "wb") as file:
        for row, (label, image) in rows.items():
            file.seek(row * RECORD)
            file.write(bytes([label]) + image.transpose(2, 0, 1).tobytes())
        file.truncate(10_000 * RECORD)


def image_of(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.fixture
def binary(tmp_path):
    for i, name in enumerate(BINARY):
        write_binary(tmp_path / name, {i: (i, image_of(i)), 9_999: (9, image_of(10 + i))})
    return tmp_path


def refusal(load, *arguments, kind=ValueError):
    with pytest.raises(kind) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_binary_files_come_back_as_written(binary, tmp_path):
    images = load_cifar10(binary)
    assert images.train_images.shape == (50_000, 32, 32, 3) and images.test_images.shape == (10_000, 32, 32, 3)
    assert images.train_images.dtype == images.test_images.dtype == np.uint8
    for i in range(5):
        for row, label, seed in ((i, i, i), (9_999, 9, 10 + i)):
            np.testing.assert_array_equal(images.train_images[10_000 * i + row], image_of(seed))
            assert images.train_labels[10_000 * i + row] == label
    np.testing.assert_array_equal(images.test_images[[5, 9_999]], [image_of(5), image_of(15)])
    assert images.test_labels[[5, 9_999]].tolist() == [5, 9] and images.test_labels.sum() == 14
    # Unpacked, the set lies in a folder of its own name.
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in BINARY:
        (binary / name).rename(folder / name)
    assert load_cifar10(tmp_path).test_labels.sum() == 14


@pytest.mark.parametrize("change", [-1, -RECORD, 1, RECORD])
def test_wrong_size(change, binary):
    with open(binary / BINARY[2], "r+b") as file:
        file.truncate(10_000 * RECORD + change)
    message = refusal(load_cifar10, binary)
    for word in (str(binary / BINARY[2]), str(10_000 * RECORD + change), "30730000", "again"):
        assert word in message


def test_label_above_nine(binary):
    write_binary(binary / BINARY[5], {7: (10, image_of(0))})
    message = refusal(load_cifar10, binary)
    assert str(binary / BINARY[5]) in message and "label 10 in row 7" in message


def test_missing_binary_file(binary):
    (binary / BINARY[3]).unlink()
    message = refusal(load_cifar10, binary, kind=FileNotFoundError)
    assert str(binary / BINARY[3]) in message and "binary version" in message


@pytest.mark.parametrize("where", ["data_batch_1", "cifar-10-batches-py/data_batch_1"])
def test_pickled_version_is_refused(where, tmp_path):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x02}q\x01.")
    message = refusal(load_cifar10, tmp_path)
    for word in (str(path if path.parent == tmp_path else path.parent), "pickled", "binary version"):
        assert word in message


def test_sources(tmp_path):
    assert "'binary', 'tfds'" in refusal(load_cifar10, tmp_path, "web")
    assert "needs data_dir" in refusal(load_cifar10, None)


def test_tfds_set_that_is_not_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    message = refusal(load_cifar10, tmp_path, "tfds", kind=FileNotFoundError)
    assert "'cifar10' is not prepared" in message


def test_tfds_set_that_is_prepared(monkeypatch):
    class Rows(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    splits = [Rows({"image": image_of(i), "label": i} for i in split) for split in ([3, 1, 4], [1, 5])]
    monkeypatch.setattr("cl_zoo.datasets.cifar.tfds_splits", lambda name, data_dir: splits)
    images = load_cifar10(None, "tfds")
    assert images.train_labels.tolist() == [3, 1, 4] and images.test_labels.tolist() == [1, 5]
    np.testing.assert_array_equal(images.test_images, [image_of(1), image_of(5)])


# CIFAR-10-C

SHAPE = (50_000, 32, 32, 3)


def write_mapped(path, shape=SHAPE, dtype=np.uint8):
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


@pytest.fixture
def folder(tmp_path):
    images = write_mapped(tmp_path / "fog.npy")
    for severity in range(1, 6):
        images[10_000 * (severity - 1)] = image_of(severity)
        images[10_000 * severity - 1] = image_of(10 + severity)
    images.flush()
    np.save(tmp_path / "labels.npy", np.tile(np.arange(10_000) % 10, 5).astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize("severity", [1, 2, 5])
def test_rows_of_a_severity(severity, folder):
    images, labels = load_cifar10_c(folder, "fog", severity)
    assert images.shape == (10_000, 32, 32, 3) and images.dtype == np.uint8 and isinstance(images, np.memmap)
    np.testing.assert_array_equal(images[0], image_of(severity))
    np.testing.assert_array_equal(images[-1], image_of(10 + severity))
    np.testing.assert_array_equal(labels, np.arange(10_000) % 10)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


@pytest.mark.parametrize("name", ["fog.npy", "labels.npy"])
def test_missing_file(name, folder):
    (folder / name).unlink()
    message = refusal(load_cifar10_c, folder, "fog", 1, kind=FileNotFoundError)
    assert str(folder / name) in message and "CIFAR-10-C" in message


@pytest.mark.parametrize("keep", [0, 5, 60, 128, 1_000_000])
def test_truncated(keep, folder):
    with open(folder / "fog.npy", "r+b") as file:
        file.truncate(keep)
    message = refusal(load_cifar10_c, folder, "fog", 1)
    assert str(folder / "fog.npy") in message and "truncated" in message and "again" in message


@pytest.mark.parametrize(
    "shape,dtype", [((10_000, 32, 32, 3), np.uint8), (SHAPE, np.int8), ((50_000, 3, 32, 32), np.uint8)]
)
def test_another_array(shape, dtype, folder):
    write_mapped(folder / "fog.npy", shape, dtype)
    message = refusal(load_cifar10_c, folder, "fog", 1)
    for word in (str(folder / "fog.npy"), str(shape), np.dtype(dtype).name, str(SHAPE), "uint8"):
        assert word in message


@pytest.mark.parametrize("labels", [np.zeros(10_000, np.uint8), np.zeros(50_000), np.zeros((50_000, 1), np.uint8)])
def test_other_labels(labels, folder):
    np.save(folder / "labels.npy", labels)
    message = refusal(load_cifar10_c, folder, "fog", 1)
    assert str(folder / "labels.npy") in message and "(50000,)" in message


def test_labels_out_of_range(folder):
    labels = np.zeros(50_000, np.int64)
    labels[20_003] = -1
    np.save(folder / "labels.npy", labels)
    assert "label -1 in row 20003" in refusal(load_cifar10_c, folder, "fog", 3)


def test_pickled_arrays_and_archives(folder):
    np.save(folder / "fog.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    message = refusal(load_cifar10_c, folder, "fog", 1)
    assert str(folder / "fog.npy") in message and "pickled" in message
    (folder / "fog.npy").write_bytes(b"\x80\x04}q\x01.")
    assert "pickled" in refusal(load_cifar10_c, folder, "fog", 1)
    file = io.BytesIO()
    np.savez(file, np.zeros(3))
    (folder / "fog.npy").write_bytes(file.getvalue())
    assert "archive" in refusal(load_cifar10_c, folder, "fog", 1)


def test_unknown_condition(folder):
    assert "corruption is 'rain'" in refusal(load_cifar10_c, folder, "rain", 1)
    assert "severity is 6" in refusal(load_cifar10_c, folder, "fog", 6)
