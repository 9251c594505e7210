"""Published logs in their packed form: exactly what was printed, refused when damaged."""

import numpy as np
import pandas as pd
import pytest

from lib import zoo
from lib.counts import counts_from_log
from lib.metrics import average_certified_radius
from lib.noise import Gaussian
from lib.store.published import read_published, save_logs
from lib.store.records import load_arrays

FILE = zoo.DATA / "records/published/cifar10-resnet110.npz"
# Issued with the logs: the average certified radii over all 10,000 images.
ACR = {
    "cohen": (0.424, 0.525, 0.511),
    "stab": (0.420, 0.531, 0.515),
    "salman": (0.544, 0.684, 0.790),
    "macer": (0.531, 0.691, 0.744),
    "consistency": (0.552, 0.719, 0.756),
    "cat-rs": (0.562, 0.756, 0.815),
}


def log_of(radius, predict=(0, 1, -1), label=(0, 2, 2)):
    correct = [int(a == b) for a, b in zip(predict, label, strict=True)]
    columns = {"idx": [0, 5, 9], "label": label, "predict": predict, "radius": radius}
    return pd.DataFrame(columns | {"correct": correct, "time": 1.0})


@pytest.mark.parametrize("method", ACR)
def test_the_published_average_certified_radii(method):
    for sigma, expected in zip((0.25, 0.5, 1.0), ACR[method], strict=True):
        log = zoo.published(f"cifar10-resnet110-{method}-sigma{sigma:.2f}")
        assert len(log) == 10_000
        assert (log.attrs["sigma"], log.attrs["n"], log.attrs["alpha"]) == (sigma, 100_000, 0.001)
        certificates = log.rename(columns={"predict": "prediction"})
        found = average_certified_radius(certificates, log["label"])
        assert found == pytest.approx(expected, abs=0.0015)
        # The largest radius that n and alpha allow, 3.811 sigma, is in every log, as printed.
        largest = float(f"{3.8115 * sigma:.3g}")
        assert log["radius"].max() == largest


@pytest.mark.parametrize(
    "name", ["cifar10-resnet110-cohen-sigma0.50", "imagenet-resnet50-consistency-sigma1.00"]
)
def test_votes_come_back_from_a_published_log(name):
    log = zoo.published(name)
    found = counts_from_log(log, Gaussian(log.attrs["sigma"]), log.attrs["n"], log.attrs["alpha"])
    assert (found.counts.sum(axis=1) == 100_000).all()
    assert (found.abstained == (log["predict"] < 0)).all()


def test_what_is_packed_comes_back_as_printed(tmp_path):
    radii = [0.00135, 3.81, 0.0], [5.07e-06, 1.0, 12.5]
    tables = {"a": log_of(radii[0]), "b": log_of(radii[1], predict=(3, 2, 1))}
    save_logs(tmp_path / "logs.npz", tables, {"a": {"sigma": 1.0}, "b": {"sigma": 2.0}}, source="x")
    for (name, table), sigma in zip(tables.items(), (1.0, 2.0), strict=True):
        found = read_published(tmp_path / "logs.npz", name)
        pd.testing.assert_frame_equal(found, table.drop(columns="time"), check_dtype=False)
        assert found.attrs == {"source": "x", "sigma": sigma}
    assert load_arrays(tmp_path / "logs.npz", "")[0]["logs"].keys() == {"a", "b"}


def test_what_cannot_be_packed_is_refused(tmp_path):
    path, good = tmp_path / "logs.npz", log_of([0.1, 0.2, 0.0])
    with pytest.raises(ValueError, match="more than four significant digits"):
        save_logs(path, {"a": log_of([0.12345, 1.0, 0.0])}, {"a": {}})
    other = log_of([0.1, 0.2, 0.0], label=(1, 1, 1))
    with pytest.raises(ValueError, match="b has other values of label"):
        save_logs(path, {"a": good, "b": other}, {"a": {}, "b": {}})
    with pytest.raises(ValueError, match="a class correct that is not the label"):
        save_logs(path, {"a": good.assign(correct=1)}, {"a": {}})


def test_damage_and_unknown_names_are_refused(tmp_path):
    data = bytearray(FILE.read_bytes())
    data[1000] ^= 1
    (tmp_path / "logs.npz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_published(tmp_path / "logs.npz", "cohen-sigma0.25")
    with pytest.raises(ValueError, match="name must be one of"):
        read_published(FILE, "cohen-sigma0.3")
    with pytest.raises(ValueError, match="name must be one of"):
        zoo.published("cifar10")


def test_numpy_opens_the_file():
    with np.load(FILE) as arrays:
        assert arrays["label"].shape == (10_000,)
        assert arrays["cat-rs-sigma1.00/predict"].min() == -1
