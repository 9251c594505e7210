"""Data sets as tensors in [0, 1]: the digits that ship with scikit-learn, and the files that the others come in, made here by hand."""

import gzip
import tarfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lib.data import INFO, content_hash, load

RNG = np.random.default_rng(0)


def test_digits_are_split_once_and_for_all():
    """1,437 and 360 images that together are scikit-learn's 1,797, none in both, every class in each."""
    (train, train_labels), (test, test_labels) = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    rows = torch.cat([train, test]).reshape(1797, 64).numpy()
    labels = torch.cat([train_labels, test_labels]).numpy()
    digits = load_digits()

    def in_order(images, targets):
        both = np.column_stack([images, targets])
        return both[np.lexsort(both.T)]

    np.testing.assert_array_equal(in_order(rows, labels), in_order(digits.data / 16, digits.target))
    assert set(test_labels.tolist()) == set(range(10))
    assert torch.equal(load("digits", "test")[0], test)
    assert content_hash(train) != content_hash(test)


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_tensors_in_the_unit_range(split):
    images, labels = load("digits", split)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape[1:] == INFO["digits"].shape
    assert (images.min(), images.max()) == (0, 1)


def test_the_constants_of_the_digits_are_those_of_the_training_images():
    images = load("digits", "train")[0]
    assert images.mean() == pytest.approx(INFO["digits"].mean[0], abs=5e-4)
    assert images.std() == pytest.approx(INFO["digits"].std[0], abs=5e-4)


# ------------------------------------------------------------------ files


def idx(array):
    """Bytes of an IDX file of unsigned bytes: magic number, sizes, data."""
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_mnist(folder, images, labels, part="t10k", zipped=True):
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array))) if zipped else (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_from_its_files(tmp_path, zipped):
    images, labels = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([3, 0, 9, 9, 1], dtype=np.uint8)
    write_mnist(tmp_path, images, labels, zipped=zipped)
    found, targets = load("mnist", "test", path=tmp_path)
    np.testing.assert_array_equal(found.numpy(), (images / np.float32(255))[:, None])
    assert targets.tolist() == [3, 0, 9, 9, 1]


def test_damaged_mnist_files_are_refused(tmp_path):
    images, labels = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.zeros(5, dtype=np.uint8)
    write_mnist(tmp_path, images, labels)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"hello", gzip.compress(idx(images)[:-1]), gzip.compress(b"")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz"):
            load("mnist", "test", path=tmp_path)
    write_mnist(tmp_path, images[:, :20], labels)
    with pytest.raises(ValueError, match="is not mnist"):
        load("mnist", "test", path=tmp_path)
    write_mnist(tmp_path, images, labels[:4])
    with pytest.raises(ValueError, match="is not mnist"):
        load("mnist", "test", path=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="IDX files"):
        load("mnist", "test", path=tmp_path)


def test_cifar10_from_each_of_its_forms(tmp_path):
    """The binary batches in a folder and in a tar file, and Keras's npz, give the same tensors."""
    images, labels = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8), RNG.integers(0, 10, 6, dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels, strict=True)))
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    np.savez(tmp_path / "cifar.npz", x_test=images.transpose(0, 2, 3, 1), y_test=labels[:, None])
    for path in (folder, tmp_path / "cifar.tar.gz", tmp_path / "cifar.npz"):
        found, targets = load("cifar10", "test", path=path)
        np.testing.assert_array_equal(found.numpy(), images / np.float32(255))
        np.testing.assert_array_equal(targets, labels)
        with pytest.raises(ValueError, match=r"lacks data_batch_1|x_train"):
            load("cifar10", "train", path=path)


def test_damaged_cifar10_files_are_refused(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(ValueError, match=r"test_batch\.bin is damaged: 6145 bytes"):
        load("cifar10", "test", path=tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + bytes(3072))
    with pytest.raises(ValueError, match="is not cifar10"):
        load("cifar10", "test", path=tmp_path)
    (tmp_path / "c.tar.gz").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"c\.tar\.gz is damaged"):
        load("cifar10", "test", path=tmp_path / "c.tar.gz")
    np.savez(tmp_path / "c.npz", x_test=np.zeros((2, 32, 32, 3)), y_test=np.zeros(2, dtype=np.uint8))
    with pytest.raises(ValueError, match="x_test must be uint8"):
        load("cifar10", "test", path=tmp_path / "c.npz")


def test_data_that_is_not_there_says_where_it_belongs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the path of cifar10"):
        load("cifar10", "test", path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"imagenet.val must be a folder .*image-net\.org"):
        load("imagenet", "test", root=tmp_path)
    with pytest.raises(ValueError, match="path: digits ship inside scikit-learn"):
        load("digits", "test", path=tmp_path)
