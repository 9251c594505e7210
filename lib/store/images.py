"""Files of images: the forms that the data sets come in, and a file of your own images."""

import gzip
import io
import pathlib
import pickle
import tarfile
import zipfile
import zlib

import numpy as np

IDX = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx(path):
    """The array of unsigned bytes in an IDX file, gzipped or not.

    Its head is two zeros, the type 0x08, the number of dimensions, then each size in four bytes.
    """
    if not path.exists() and path.with_suffix("").exists():
        path = path.with_suffix("")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: it is one of the data set's four IDX files, "
            f"{', '.join(sum(IDX.values(), ()))}"
        )
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Replace it by a whole one") from error
    dimensions = data[3] if len(data) > 3 else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise ValueError(f"{path} is no whole IDX file of bytes. Replace it by a whole one")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_cifar10(split, path):
    """uint8 images [N, 3, 32, 32] and labels [N] from any of the forms that CIFAR-10 comes in."""
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    if path.suffix == ".npz":
        return _keras(split, path)
    files = _batches(path, batches)
    missing = [batch for batch in batches if batch not in files and f"{batch}.bin" not in files]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} (each with or without .bin): give "
            "cifar-10-batches-bin, cifar-10-batches-py or an npz"
        )
    parts = [
        _binary(files[f"{b}.bin"], f"{path}: {b}.bin")
        if f"{b}.bin" in files
        else _pickled(files[b], f"{path}: {b}")
        for b in batches
    ]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _batches(path, batches):
    """{name: bytes} of the batches, with or without .bin, in a folder or a tar file."""
    files = {}
    try:
        if path.is_dir():
            for file in path.iterdir():
                if file.name.removesuffix(".bin") in batches:
                    files[file.name] = file.read_bytes()
        else:
            with tarfile.open(path) as tar:
                for member in tar:
                    name = pathlib.PurePath(member.name).name
                    if member.isfile() and name.removesuffix(".bin") in batches:
                        files[name] = tar.extractfile(member).read()
                while tar.fileobj.read(1 << 20):  # to the end, where the checksum is
                    pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no tar file: {error}") from error
    return files


def _binary(data, source):
    if not data or len(data) % 3073:
        raise ValueError(f"{source} is damaged: {len(data)} bytes are not a number of rows of 3073")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled numpy arrays only, as a pickle may otherwise run any program."""

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a number")


def _pickled(data, source):
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
        images = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
        return images, np.asarray(batch["labels"], np.uint8)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{source} is damaged or no batch of CIFAR-10: {error}") from error


def _keras(split, path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be an npz with x_{split} [N, 32, 32, 3] and y_{split} [N], uint8: {error}"
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: x_{split} must be uint8 [N, 32, 32, 3]; "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images.transpose(0, 3, 1, 2), labels.reshape(-1)


def read_own(path, splits=None):
    """([(images, labels) of each split], number of classes) of a file of your own images.

    - splits: "train", "test"; None: those that it holds.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the npz of your images")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = list(arrays.files)
            splits = splits or [s for s in ("train", "test") if f"x_{s}" in held] or ["test"]
            needed = [f"{part}_{split}" for split in splits for part in "xy"]
            if missing := [name for name in needed if name not in held]:
                raise ValueError(f"it lacks {missing[0]}, and holds {', '.join(held)}")
            parts = [(arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in splits]
            stated = int(arrays["classes"]) if "classes" in held else None
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be an npz of x_test [N, channels, height, width] and y_test [N] (to "
            f"train or quantise x_train and y_train, too): {error}"
        ) from error
    parts = [
        (_images(x, f"{path}: x_{s}"), _labels(y, len(x), f"{path}: y_{s}", stated))
        for s, (x, y) in zip(splits, parts, strict=True)
    ]
    if len({images.shape[1:] for images, _ in parts}) > 1:
        raise ValueError(f"{path}: x_train and x_test must have images of one shape")
    return parts, stated or int(max(labels.max() for _, labels in parts)) + 1


def _images(x, source):
    if x.ndim != 4 or not x.size:
        raise ValueError(
            f"{source} must have shape [N, channels, height, width] (grey images: x[:, None]); "
            f"got {list(x.shape)}"
        )
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"{source} must have its channels first: x.transpose(0, 3, 1, 2); got {list(x.shape)}"
        )
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise ValueError(
            f"{source} must be floats in [0, 1], or uint8 from 0 to 255 (x.astype(np.uint8)); got "
            f"{x.dtype}"
        )
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"{source} must be floats in [0, 1]: divide by 255, and leave normalisation to the "
            f"network; got {x.min():.4g} to {x.max():.4g}"
        )
    return x.astype(np.float32)


def _labels(y, size, source, classes):
    if y.shape != (size,) or y.dtype.kind not in "iu":
        raise ValueError(
            f"{source} must be {size} whole numbers, one per image (y.reshape(-1).astype(int)); "
            f"got shape {list(y.shape)} of {y.dtype}"
        )
    if y.min() < 0 or y.max() >= (classes or np.inf):
        most = f" to {classes - 1} (`classes` less one)" if classes else ""
        raise ValueError(
            f"{source} must be classes from 0{most}: np.unique(y, return_inverse=True)[1] numbers "
            f"any labels so; got {y.min()} to {y.max()}"
        )
    return y
