"""Data sets as tensors in [0, 1], from files made here by hand."""

import gzip
import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lib import data, zoo
from lib.data import IDX, INFO, content_hash, examples, info, load, name_of
from lib.store.records import load_counts

RNG = np.random.default_rng(0)


def test_digits_are_split_once_and_for_all():
    """1,437 and 360 images that together are scikit-learn's 1,797.

    None is in both, and every class is in each.
    """
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


def idx(array):
    """Bytes of an IDX file of unsigned bytes: magic number, sizes, data."""
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + b"".join(size.to_bytes(4, "big") for size in array.shape)
        + array.tobytes()
    )


def write_mnist(folder, images, labels, part="t10k", zipped=True):
    arrays = {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
    for name, array in arrays.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_from_its_files(tmp_path, zipped):
    images, labels = (
        RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        np.array([3, 0, 9, 9, 1], dtype=np.uint8),
    )
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
    images, labels = (
        RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8),
        RNG.integers(0, 10, 6, dtype=np.uint8),
    )
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(
        b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels, strict=True))
    )
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
    np.savez(
        tmp_path / "c.npz", x_test=np.zeros((2, 32, 32, 3)), y_test=np.zeros(2, dtype=np.uint8)
    )
    with pytest.raises(ValueError, match="x_test must be uint8"):
        load("cifar10", "test", path=tmp_path / "c.npz")


@pytest.mark.parametrize("name", ["cifar.tar.gz", "cifar.npz"])
def test_no_flipped_bit_of_an_archive_passes_for_images(tmp_path, name):
    """Each is either refused with a ValueError or was none of the data (a file's date, say)."""
    images, labels = (
        RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8),
        RNG.integers(0, 10, 6, dtype=np.uint8),
    )
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez_compressed(path, x_test=images.transpose(0, 2, 3, 1), y_test=labels[:, None])
    else:
        (tmp_path / "test_batch.bin").write_bytes(
            b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels, strict=True))
        )
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "test_batch.bin", arcname="test_batch.bin")
    whole, refused = path.read_bytes(), 0
    for place in np.linspace(0, len(whole) - 1, 150).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found, targets = load("cifar10", "test", path=path)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(found.numpy(), images / np.float32(255))
            np.testing.assert_array_equal(targets, labels)
    assert refused > 140


def test_data_that_is_not_there_says_where_it_belongs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the path of cifar10"):
        load("cifar10", "test", path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"imagenet.val must be a folder .*image-net\.org"):
        load("imagenet", "test", root=tmp_path)
    with pytest.raises(ValueError, match="path: digits ship inside scikit-learn"):
        load("digits", "test", path=tmp_path)


def pickled(folder, images, labels, name="test_batch"):
    """A batch of the Python version of CIFAR-10, as Python 2 wrote it: protocol 2."""
    folder.mkdir(exist_ok=True)
    batch = {
        b"data": images.reshape(len(images), -1),
        b"labels": labels.tolist(),
        b"batch_label": b"testing batch 1 of 1",
    }
    # Python 3 writes the bytes b"data" as a call of _codecs.encode; Python 2 wrote a plain string,
    # which latin1 turns into str.
    text = pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=2)
    (folder / name).write_bytes(text)


def test_cifar10_from_the_python_batches(tmp_path):
    images, labels = (
        RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8),
        np.array([9, 0, 3, 3], dtype=np.uint8),
    )
    pickled(tmp_path / "cifar-10-batches-py", images, labels)
    for batch in range(1, 6):
        pickled(tmp_path / "cifar-10-batches-py", images // batch, labels, f"data_batch_{batch}")
    found, targets = load("cifar10", "test", path=tmp_path / "cifar-10-batches-py")
    np.testing.assert_array_equal(found.numpy(), images / np.float32(255))
    assert targets.tolist() == [9, 0, 3, 3]
    found, targets = load("cifar10", "train", path=tmp_path / "cifar-10-batches-py")
    np.testing.assert_array_equal(
        found.numpy(), np.concatenate([images // b for b in range(1, 6)]) / np.float32(255)
    )
    assert targets.tolist() == 5 * [9, 0, 3, 3]


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in the file was run')",))


def test_a_batch_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({"data": Exploit(), "labels": [0]}, protocol=2)
    )
    message = (
        "test_batch is damaged or no batch of CIFAR-10: .*exec is neither an array nor a number"
    )
    with pytest.raises(ValueError, match=message):
        load("cifar10", "test", path=tmp_path)


@pytest.fixture
def server(tmp_path):
    """A folder and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{web.server_port}/"
        web.shutdown()
        thread.join()


def published(monkeypatch, folder, address, name="mnist"):
    """Make lib.data take the files of a data set from `address`.

    Their checksums are those of the files in `folder`.
    """
    for file in IDX["test"]:
        checksum = hashlib.md5((folder / file).read_bytes()).hexdigest()
        monkeypatch.setitem(data.DOWNLOADS, (name, file), (address, f"md5:{checksum}"))


def test_a_download_is_checked_and_kept(server, tmp_path, monkeypatch):
    folder, address = server
    images, labels = (
        RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        np.array([3, 0, 9, 9, 1], dtype=np.uint8),
    )
    write_mnist(folder, images, labels)
    published(monkeypatch, folder, address)
    monkeypatch.setenv("SMOOTHING_DATA", str(tmp_path / "kept"))
    found, targets = load("mnist", "test")
    np.testing.assert_array_equal(found.numpy(), (images / np.float32(255))[:, None])
    assert targets.tolist() == labels.tolist()
    for file in folder.iterdir():
        file.unlink()
    # From the disk: the server has nothing any more.
    assert torch.equal(load("mnist", "test")[0], found)


def test_offline_or_with_another_checksum_it_says_which_file_and_where_from(
    server, tmp_path, monkeypatch
):
    folder, address = server
    write_mnist(folder, np.zeros((5, 28, 28), dtype=np.uint8), np.zeros(5, dtype=np.uint8))
    published(monkeypatch, folder, address)
    write_mnist(folder, np.ones((5, 28, 28), dtype=np.uint8), np.zeros(5, dtype=np.uint8))
    file = "t10k-images-idx3-ubyte.gz"
    message = (
        rf"{tmp_path}/mnist/{file} is missing .*{address}{file} \({{}}\): "
        "fetch it by hand and put it into"
    )
    with pytest.raises(FileNotFoundError, match=message.format("what came has another checksum")):
        load("mnist", "test", root=tmp_path)
    assert not list((tmp_path / "mnist").iterdir())
    closed = "http://127.0.0.1:9/"  # nothing listens on the port of "discard"
    published(monkeypatch, folder, closed)
    message = message.format("ConnectionError").replace(address, closed)
    with pytest.raises(FileNotFoundError, match=message):
        load("mnist", "test", root=tmp_path)


def test_the_addresses_are_complete():
    """Each file that is downloaded has an address that ends in / and an MD5 checksum."""
    assert {name for name, _ in data.DOWNLOADS} == {"mnist", "fashion", "cifar10"}
    for name in ("mnist", "fashion"):
        assert {file for known, file in data.DOWNLOADS if known == name} == set(
            sum(IDX.values(), ())
        )
    for address, checksum in data.DOWNLOADS.values():
        assert address.startswith("http")
        assert address.endswith("/")
        assert len(bytes.fromhex(checksum.removeprefix("md5:"))) == 16


def test_imagenet_is_read_as_cohens_code_reads_it(tmp_path):
    """Labels by the sorted names of the folders; shorter side to 256, centre 224x224.

    Only what is indexed is read.
    """
    sizes = {"n02": [(300, 400), (256, 256)], "n01": [(500, 280)], "n10": [(224, 224)]}
    pictures = {}
    for wnid, shapes in sizes.items():
        (tmp_path / "imagenet/val" / wnid).mkdir(parents=True)
        for number, (height, width) in enumerate(shapes):
            smooth = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            smooth.save(tmp_path / "imagenet/val" / wnid / f"{number}.png")
            pictures[wnid, number] = smooth
    images, labels = load("imagenet", "test", root=tmp_path)
    assert labels.tolist() == [0, 1, 1, 2]
    assert len(images) == 4
    (tmp_path / "imagenet/val/n10/0.png").write_bytes(b"never read")
    found = images[np.array([2, 0])]
    assert found.shape == (2, 3, 224, 224)
    assert found.dtype == torch.float32
    same = np.asarray(pictures["n02", 1])[16:240, 16:240] / np.float32(255)  # 256x256: only cropped
    np.testing.assert_array_equal(found[0].numpy(), same.transpose(2, 0, 1))
    tall = pictures["n01", 0].resize((256, int(256 * 500 / 280)), Image.Resampling.BILINEAR)
    top = round((tall.height - 224) / 2)
    np.testing.assert_array_equal(
        found[1].numpy(),
        np.asarray(tall)[top : top + 224, 16:240].transpose(2, 0, 1) / np.float32(255),
    )
    before = content_hash(images)
    (tmp_path / "imagenet/val/n02/0.png").unlink()
    assert content_hash(load("imagenet", "test", root=tmp_path)[0]) != before


def mine(path, **arrays):
    """A file of images of one's own: six and four of 1x2x3 pixels in bytes, of classes 0, 1, 2."""
    x = np.arange(60, dtype=np.uint8).reshape(10, 1, 2, 3)
    y = np.arange(10) % 3
    parts = {"x_train": x[:6], "y_train": y[:6], "x_test": x[6:], "y_test": y[6:]} | arrays
    np.savez(path, **{name: array for name, array in parts.items() if array is not None})
    return path


def test_images_of_ones_own(tmp_path):
    """Bytes or floats, one part or both; their name says what a network must know."""
    path = mine(tmp_path / "mine.npz")
    name = name_of(str(path))
    assert name == "images-1x2x3-3"
    assert (info(name).shape, info(name).classes) == ((1, 2, 3), 3)
    images, labels = load(name, "test", path=path)
    assert images.flatten().tolist() == pytest.approx((np.arange(36, 60) / 255).tolist())
    assert (images.dtype, labels.tolist()) == (torch.float32, [0, 1, 2, 0])
    assert len(load(name, "train", path=path)[0]) == 6
    floats = (np.arange(36, 60) / 255).reshape(4, 1, 2, 3)
    alone = mine(tmp_path / "alone.npz", x_train=None, y_train=None, x_test=floats, classes=5)
    assert name_of(alone) == "images-1x2x3-5"
    assert torch.equal(load("images-1x2x3-5", "test", path=alone)[0], images)
    with pytest.raises(ValueError, match=r"alone\.npz is not images-1x2x3-2: .* classes below 2"):
        load("images-1x2x3-2", "test", path=alone)
    with pytest.raises(ValueError, match=r"alone\.npz must be an npz .* it lacks x_train"):
        load(name, "train", path=alone)
    with pytest.raises(ValueError, match="images of your own: give their file"):
        load(name, "test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": np.zeros((4, 2, 3))}, r"x_test must have shape .*x\[:, None\]"),
        ({"x_test": np.zeros((4, 8, 8, 3))}, r"channels first: x.transpose\(0, 3, 1, 2\)"),
        ({"x_test": np.full((4, 1, 2, 3), 1.5)}, "x_test must be .* divide by 255.* got 1.5"),
        ({"x_test": np.full((4, 1, 2, 3), np.nan)}, "x_test must be .* got nan"),
        ({"x_test": np.zeros((4, 1, 2, 3), int)}, "x_test must be .* uint8.* got int64"),
        ({"x_test": np.zeros((4, 1, 2, 4))}, "x_train and x_test must have images of one shape"),
        ({"y_test": np.zeros((4, 1), int)}, r"y_test must be 4 whole numbers.*reshape\(-1\)"),
        ({"y_test": np.zeros(4)}, "y_test must be 4 whole numbers.* of float64"),
        ({"y_test": np.array([-1, 0, 1, 2])}, "y_test must be classes from 0: .* got -1 to 2"),
        ({"classes": 2}, "y_train must be classes from 0 to 1 .* got 0 to 2"),
        ({"y_test": None}, "mine.npz must be .* it lacks y_test, and holds x_train"),
        ({"x_test": np.array([{}])}, "mine.npz must be .* allow_pickle"),
    ],
)
def test_images_of_ones_own_that_do_not_fit_are_refused(tmp_path, arrays, message):
    path = mine(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message) as said:
        name_of(path)
    assert str(path) in str(said.value)


def test_a_file_of_ones_own_that_is_none(tmp_path):
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"text\.npz must be an npz of x_test"):
        name_of(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError, match=r"no\.npz does not exist"):
        name_of(tmp_path / "no.npz")


def test_examples_to_look_at():
    images, names = examples("cifar10")
    assert images.shape == (8, 3, 32, 32)
    # The records count the same test images first.
    first = load_counts(zoo.DATA / "records" / "cifar10-resnet20-sigma0.25.npz").labels[:8]
    assert [data.CIFAR10.index(name) for name in names] == first.tolist()
    images, names = examples("photographs")
    assert images.shape == (2, 3, 224, 224)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert names == ["china", "flower"]
    with pytest.raises(ValueError, match="name must be"):
        examples("cats")
