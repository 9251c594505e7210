"""Data sets: images in [0, 1], labels, and the constants that a model's first layer needs.

Files are downloaded once, checked, and read from disk afterwards.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import re

import numpy as np
import pooch
import torch
from sklearn.datasets import load_digits, load_sample_image

from lib.checks import check_choice
from lib.store.files import sha256
from lib.store.images import IDX, read_cifar10, read_idx, read_own


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts of a data set.

    - shape: (channels, height, width) of an image.
    - classes: number of classes.
    - mean, std: per channel, of the training images; the constants of Cohen et al.'s code.
    """

    shape: tuple
    classes: int
    mean: tuple
    std: tuple


INFO = {
    "digits": Info((1, 8, 8), 10, (0.3051,), (0.3759,)),
    "mnist": Info((1, 28, 28), 10, (0.1307,), (0.3081,)),
    "fashion": Info((1, 28, 28), 10, (0.2860,), (0.3530,)),
    "cifar10": Info((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": Info((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
OWN = re.compile(r"images-(\d+)x(\d+)x(\d+)-(\d+)")  # see name_of
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
# File: (URL, checksum as published with torchvision).
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DOWNLOADS = {
    ("mnist", "train-images-idx3-ubyte.gz"): (_MNIST, "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("mnist", "train-labels-idx1-ubyte.gz"): (_MNIST, "md5:d53e105ee54ea40749a09fcbcd1e9432"),
    ("mnist", "t10k-images-idx3-ubyte.gz"): (_MNIST, "md5:9fb629c4189551a2d022fa330f9573f3"),
    ("mnist", "t10k-labels-idx1-ubyte.gz"): (_MNIST, "md5:ec29112dd5afa0611ce80d1b7f02629c"),
    ("fashion", "train-images-idx3-ubyte.gz"): (_FASHION, "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("fashion", "train-labels-idx1-ubyte.gz"): (_FASHION, "md5:25c81989df183df01b3e8a0aad5dffbe"),
    ("fashion", "t10k-images-idx3-ubyte.gz"): (_FASHION, "md5:bef4ecab320f06d8554ea6380940ec79"),
    ("fashion", "t10k-labels-idx1-ubyte.gz"): (_FASHION, "md5:bb300cfdad3c16e7a12a480ee83cd310"),
    ("cifar10", "cifar-10-python.tar.gz"): (
        "https://www.cs.toronto.edu/~kriz/",
        "md5:c58f30108f718f92721af3b95e74349a",
    ),
}


def info(name):
    """The Info of a data set, or of images of your own by their name (name_of).

    Theirs normalises by 0.5 and 0.5. Raises ValueError naming data.
    """
    if own := OWN.fullmatch(str(name)):
        *shape, classes = map(int, own.groups())
        return Info(tuple(shape), classes, (0.5,) * shape[0], (0.5,) * shape[0])
    check_choice(INFO, data=name)
    return INFO[name]


def is_file(data):
    """Whether `data` is a file of your own images, FILE.npz, and not a name."""
    return str(data).endswith(".npz")


def name_of(data):
    """The name of a data set: of FILE.npz, "images-CHANNELSxHEIGHTxWIDTH-CLASSES", else as it is.

    That name says all that a network must know of the images, so that a checkpoint is rebuilt
    without them; which images a run certified, the hash in its record says.

    FILE.npz holds images of your own:
    - x_test [N, channels, height, width], floats in [0, 1] or uint8, and y_test [N], classes 0, 1,
      ...: what is certified. x_train and y_train, as well: to train or to quantise.
    - classes: their number, where it is not the highest label and one.

    Raises FileNotFoundError, or ValueError naming the file, the array and the remedy.
    """
    if not is_file(data):
        return data
    parts, classes = read_own(pathlib.Path(data))
    return own_name(parts[0][0].shape[1:], classes)


def own_name(shape, classes):
    """The name of images of your own (name_of)."""
    return f"images-{'x'.join(map(str, shape))}-{classes}"


def fits(name, wanted):
    """Whether a network of the data set `wanted` takes the images of `name`: None, its own, or
    images of yours that have their shape and no more classes.
    """
    if name in (None, wanted) or not OWN.fullmatch(str(name)):
        return name in (None, wanted)
    here, there = info(name), info(wanted)
    return here.shape == there.shape and here.classes <= there.classes


def load(name, split, root=None, path=None):
    """A data set as two torch tensors: (images, labels).

    Images are float32 [N, channels, height, width] in [0, 1], labels int64 [N]. Certificates hold
    numpy arrays, with which a tensor does not compare: `certificates.frame(labels).correct.mean()`
    is the share that is right.

    - name: "digits" (1,797 grey 8x8 images that ship inside scikit-learn, split once and for all:
      1,437 train, 360 test), "mnist", "fashion", "cifar10", or "imagenet" (shorter side to 256,
      centre 224x224; images then are an `ImageFolder`, read when indexed), or the name of images
      of your own, name_of(FILE.npz), with that file as path.
    - split: "train" or "test" (imagenet: the folder "val").
    - root: folder of downloads, each data set in its own folder; default $SMOOTHING_DATA, else
      data/downloads. Where mnist, fashion or cifar10 is missing it is downloaded and checked;
      imagenet must lie there (train/ and val/, one folder per class).
    - path: reads this file or folder instead: the folder of the four IDX files; for cifar10
      cifar-10-batches-bin, cifar-10-batches-py, the tar.gz of either, or an npz with x_train,
      y_train, x_test, y_test (Keras's); for imagenet the folder of class folders itself.

    Raises ValueError naming name, split or the damaged file; FileNotFoundError naming the file, its
    URL and where to put it.
    """
    own = OWN.fullmatch(str(name))
    check_choice([name] if own else INFO, name=name)
    check_choice(("train", "test"), split=split)
    if own and path is None:
        raise ValueError(f"{name} are images of your own: give their file, --data FILE.npz (path)")
    if path is not None and not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist: give the path of {name} on disk, or leave it out"
        )
    default = pathlib.Path(__file__).parent.parent / "data/downloads"
    folder = pathlib.Path(root or os.environ.get("SMOOTHING_DATA") or default) / name
    path = None if path is None else pathlib.Path(path)
    if own:
        ((images, labels),), _ = read_own(path, [split])
        return _checked(name, images, labels, path)
    if name == "imagenet":
        folder = path or folder / ("val" if split == "test" else "train")
        images = ImageFolder(folder)
        return images, images.labels
    if name == "digits":
        if path is not None:
            raise ValueError(
                f"path: digits ship inside scikit-learn and are not read from {path}; leave it out"
            )
        images, labels = _digits(split)
    elif name == "cifar10":
        images, labels = read_cifar10(
            split, path or _fetch("cifar10", "cifar-10-python.tar.gz", folder)
        )
    else:
        images, labels = (
            read_idx(path / file if path else _fetch(name, file, folder)) for file in IDX[split]
        )
        images = images[:, None]
    return _checked(name, images, labels, path or folder)


def _checked(name, images, labels, source):
    facts = info(name)
    if (
        images.shape[1:] != facts.shape
        or labels.shape != (len(images),)
        or not len(labels)
        or labels.max() >= facts.classes
    ):
        raise ValueError(
            f"{source} is not {name}: images {images.shape} and labels {labels.shape}, instead of "
            f"[N, {facts.shape}] and [N], classes below {facts.classes}"
        )
    # Bytes of a file are read-only to numpy: torch needs a copy of its own.
    images = torch.from_numpy(np.array(images, order="C"))
    images = images if images.dtype == torch.float32 else images.float().div_(255)
    return images, torch.from_numpy(labels.astype(np.int64))


def content_hash(images):
    """Hex SHA-256 of the float32 values of images, or of an ImageFolder's file names and sizes."""
    if isinstance(images, torch.Tensor):
        return sha256(images.numpy().tobytes())
    return images.content_hash()


def _fetch(name, file, folder):
    """The path of a file of DOWNLOADS in `folder`, downloaded where it is missing or damaged."""
    base, checksum = DOWNLOADS[name, file]
    try:
        return pathlib.Path(
            pooch.retrieve(base + file, checksum, fname=file, path=folder, progressbar=True)
        )
    except (OSError, ValueError) as error:
        why = (
            "what came has another checksum" if type(error) is ValueError else type(error).__name__
        )
        raise FileNotFoundError(
            f"{folder / file} is missing or damaged, and could not be downloaded from "
            f"{base + file} ({why}): fetch it by hand and put it into {folder}, or set "
            f"SMOOTHING_DATA to the folder that holds {name}/{file}"
        ) from error


def _digits(split):
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order = order[360:] if split == "train" else order[:360]
    return digits.images[order].astype(np.float32)[:, None] / 16, digits.target[order]


class ImageFolder:
    """Images in a folder of class folders, read when indexed, so that memory stays flat.

    folder[index array [B]] gives float32 [B, 3, 224, 224] in [0, 1]: the shorter side is resized to
    256 and the centre cropped, as in Cohen et al.'s code. `labels` are places among the sorted
    names of the class folders.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        if not folder.is_dir() or not any(child.is_dir() for child in folder.iterdir()):
            raise FileNotFoundError(
                f"{folder} must be a folder with one folder of images per class (n01440764, ...): "
                "ImageNet is not downloaded; get it from https://image-net.org, sort the images "
                "into class folders, and put it there or give its path"
            )
        size = INFO["imagenet"].shape[1]
        steps = torchvision().transforms
        transform = steps.Compose([steps.Resize(256), steps.CenterCrop(size), steps.ToTensor()])
        self._folder = torchvision().datasets.ImageFolder(folder, transform)
        self.labels = torch.tensor(self._folder.targets)

    def __len__(self):
        return len(self._folder)

    def __getitem__(self, index):
        return torch.stack([self._folder[int(i)][0] for i in np.asarray(index).reshape(-1)])

    def content_hash(self):
        root = pathlib.Path(self._folder.root)
        files = [
            (pathlib.Path(path).relative_to(root).as_posix(), os.path.getsize(path))
            for path, _ in self._folder.samples
        ]
        return sha256(repr(files).encode())


@functools.cache
def torchvision():
    """The torchvision package: the one place that imports it, when it is first needed.

    torchvision registers kernels for two operators of its compiled part when it is imported. Beside
    a build of torch that this part was not made for (a CPU build with the PyPI wheel) they do not
    exist and the import fails, although models, transforms and data sets need neither. They are
    declared here where they are missing, and only there.
    """
    folder = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(str(next(folder.glob("_C.*"))))
    except (StopIteration, OSError):
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", boxes)
        torch.library.define("torchvision::qnms", boxes)
    return importlib.import_module("torchvision")


def examples(name):
    """A few images to look at: (images float32 [B, 3, height, width] in [0, 1], names of each).

    - name: "cifar10" (eight committed test images, JPEG copies) or "photographs" (two, 224 pixels
      square, that ship inside scikit-learn).

    Raises ValueError naming another name.
    """
    check_choice(("cifar10", "photographs"), name=name)
    if name == "cifar10":
        found = np.load(pathlib.Path(__file__).parent.parent / "data/images/cifar10-thumbnails.npz")
        images, names = found["images"], [CIFAR10[label] for label in found["labels"]]
    else:
        photographs = [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
        height = min(image.shape[0] for image in photographs)
        middle = [image[:, (image.shape[1] - height) // 2 :][:, :height] for image in photographs]
        images, names = np.stack(middle), ["china", "flower"]
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    if name == "photographs":
        images = torch.nn.functional.interpolate(images, 224, mode="area")
    return images, names
