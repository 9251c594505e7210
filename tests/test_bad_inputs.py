"""Each bad input is a ValueError that names the argument, what was expected and what came.

Run as a script (`python tests/test_bad_inputs.py`) it prints every message.
"""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from lib import bounds, metrics
from lib.adaptive import certify_anytime, certify_at
from lib.certify import Certificates, certify, certify_margin, predict
from lib.counts import RecordedCounts, SimulatedCounts, counts_from_log
from lib.data import load
from lib.engine.classifier import BaseClassifier
from lib.engine.int8 import quantize
from lib.engine.live import ModelCounts
from lib.ensemble import Ensemble
from lib.iss import certify_iss, failure_rate, sample_size_map
from lib.losses import GaussianLoss
from lib.models import build
from lib.noise import Gaussian, Uniform
from lib.sigma import optimize_sigma
from lib.store.records import Record, save_counts
from lib.theory import cohen_radius, lecuyer_radius, li_radius
from lib.train import Schedule, fit

X = torch.full((2, 1, 8, 8), 0.5)
Y = torch.tensor([0, 1])
LOG = pd.DataFrame(
    {"idx": [0], "label": [0], "predict": [0], "radius": [0.5], "correct": [1], "time": [0.0]}
)


def network(bias=0.0):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    torch.nn.init.constant_(model[1].bias, bias)
    return model


def live(x=X, noise=None, model=None, **settings):
    engine = (
        {}
        if isinstance(model, BaseClassifier)
        else {"dtype": torch.float32, "block": 16, "layout": "contiguous", "compile": False}
    )
    return ModelCounts(
        network() if model is None else model, x, noise or Gaussian(0.5), **engine | settings
    )


def convolution():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 8), torch.nn.Flatten())


def mixing():
    return torch.nn.Sequential(torch.nn.BatchNorm2d(1, track_running_stats=False), network())


def votes():
    return RecordedCounts([[900, 100], [10, 990]])


def recorded():
    return RecordedCounts(
        Record(
            np.array([[90, 10]]), np.array([4]), np.array([0]), {"noise": Gaussian(0.5).describe()}
        )
    )


def certificates():
    return Certificates.from_bounds(np.array([0, 1]), np.array([0.9, 0.8]), Gaussian(1.0), draws=10)


def run(n0=10, n=100, alpha=0.001, **kw):
    return certify(votes(), Gaussian(0.5), n0, n, alpha, **kw)


def train(x=X, y=Y, epochs=1, batch=2, lr=0.1, noise=0.5, device=None, **settings):
    schedule = Schedule(epochs, lr, batch, **settings)
    return fit(network(), x, y, GaussianLoss(), Gaussian(noise), schedule, device=device)


SIZES = sample_size_map(100, 0.1, "absolute", Gaussian(0.5), 0.001, step=0.1)


def iss(**settings):
    return certify_iss(votes(), Gaussian(0.5), 10, 100, SIZES, 0.001, **settings)


# Name: (call, what its message must hold).
BAD = {
    "alpha 0": (lambda: run(alpha=0), ["alpha", "(0, 1)", "got 0"]),
    "alpha 1": (lambda: predict(votes(), 10, 1), ["alpha", "(0, 1)"]),
    "alpha negative": (lambda: bounds.clopper_pearson_lower(3, 5, -0.1), ["alpha", "-0.1"]),
    "alpha NaN": (lambda: run(alpha=math.nan), ["alpha", "nan"]),
    "alpha text": (lambda: run(alpha="0.001"), ["alpha", "'0.001'"]),
    "alpha list": (lambda: run(alpha=[0.001]), ["alpha", "[0.001]"]),
    "alpha complex": (lambda: run(alpha=0.1 + 0j), ["alpha"]),
    "alpha that a double rounds to 1": (
        lambda: run(alpha=Fraction(10**20 - 1, 10**20)),
        ["alpha", "(0, 1)"],
    ),
    "alpha too small": (
        lambda: bounds.clopper_pearson_lower(3, 5, 1e-250),
        ["alpha", "1e-200", "1e-250"],
    ),
    "alpha of theorem 5": (
        lambda: bounds.certified_accuracy_lower(5, 10, 0.6, 0.001),
        ["alpha", "1/2", "0.6"],
    ),
    "rho": (lambda: bounds.certified_accuracy_lower(5, 10, 0.001, 0), ["rho", "(0, 1)"]),
    # Numbers of draws.
    "n 0": (lambda: run(n=0), ["n must", "at least 1", "0"]),
    "n negative": (lambda: predict(votes(), -5, 0.001), ["n must", "-5"]),
    "n float": (lambda: run(n=100.0), ["n must", "whole", "100.0"]),
    "n text": (lambda: run(n="100"), ["n must", "'100'"]),
    "n bool": (lambda: run(n=True), ["n must", "True"]),
    "n none": (lambda: run(n=None), ["n must", "None"]),
    "n of the wrong length": (lambda: votes().draw([1, 2, 3]), ["n must", "2 of them"]),
    "n matrix": (lambda: SimulatedCounts([[0.5, 0.5]]).draw([[1]]), ["n must"]),
    "draws negative": (lambda: votes().draw([-1, 2]), ["n must", "at least 0", "-1"]),
    "n beyond the checked range": (
        lambda: bounds.clopper_pearson_lower(5, 10**10 + 1, 0.001),
        ["n must", "at most 1e+10"],
    ),
    "n of an upper bound beyond the checked range": (
        lambda: bounds.clopper_pearson_upper(5, 1e12, 0.001),
        ["n must", "at most 1e+10"],
    ),
    "n beyond 63 bits": (lambda: run(n=np.uint64(2**63)), ["n must", "at most 1e+10"]),
    "draws beyond 63 bits": (
        lambda: votes().draw(np.uint64(2**63)),
        ["n must", "at most 1e+10"],
    ),
    "n0 0": (lambda: run(n0=0), ["n0 must", "at least 1"]),
    "n0 float": (lambda: run(n0=10.5), ["n0 must", "whole", "10.5"]),
    "noise of other draws": (
        lambda: certify(live(), Gaussian(0.6), 10, 100, 0.001),
        ["noise", "drawn under", "sigma=0.5", "sigma=0.6"],
    ),
    "noise of other draws, one image": (
        lambda: certify(live(noise=Gaussian([0.5, 0.25])), Gaussian([0.5, 0.3]), 10, 100, 0.001),
        ["noise", "0.25", "0.3"],
    ),
    "noise of another record": (
        lambda: certify(recorded(), Gaussian(0.6), 10, 50, 0.001),
        ["noise", "sigma=0.5", "sigma=0.6"],
    ),
    "noise of other draws, iss": (
        lambda: certify_iss(live(noise=Gaussian(0.6)), Gaussian(0.5), 10, 100, SIZES, 0.001),
        ["noise", "sigma=0.6"],
    ),
    "n0 beside a given class": (lambda: run(n0=10, prediction=[0, 1]), ["n0", "0", "10"]),
    "n of a bound 0": (
        lambda: bounds.clopper_pearson_lower(0, 0, 0.001),
        ["n must", "at least 1", "0.0"],
    ),
    "n of a bound infinite": (
        lambda: bounds.clopper_pearson_upper(3, math.inf, 0.001),
        ["n must", "finite", "inf"],
    ),
    "a record exhausted": (
        lambda: run(n=991),
        ["exhausted", "n = 991", "example 0", "990", "fewer draws"],
    ),
    # Counts and probabilities.
    "k above n": (
        lambda: bounds.clopper_pearson_lower([3, 7], 5, 0.001),
        ["k must", "k = 7.0, n = 5.0"],
    ),
    "k text": (
        lambda: bounds.clopper_pearson_lower("a", 5, 0.001),
        ["k must be a number", "'a'"],
    ),
    "k negative": (lambda: bounds.clopper_pearson_upper(-1, 5, 0.001), ["k must", "0 <= k <= n"]),
    "k NaN": (lambda: bounds.clopper_pearson_lower(math.nan, 5, 0.001), ["k must", "nan"]),
    "n_a below n_b": (
        lambda: bounds.top_class_pvalue(3, 5),
        ["n_a", "n_b", "n_a = 3.0, n_b = 5.0"],
    ),
    "n_b negative": (lambda: bounds.top_class_pvalue(3, -1), ["n_b", "-1"]),
    "n_a infinite": (lambda: bounds.top_class_pvalue(math.inf, 1), ["n_a", "inf"]),
    "y above m": (
        lambda: bounds.certified_accuracy_lower(11, 10, 0.001, 0.001),
        ["y must", "0 <= y <= m", "y = 11.0, m = 10.0"],
    ),
    "y a share": (
        lambda: bounds.certified_accuracy_lower(0.8, 5, 0.001, 0.001),
        ["y must", "whole numbers", "np.round(share * m)", "y = 0.8"],
    ),
    "m 0": (lambda: bounds.certified_accuracy_lower(0, 0, 0.001, 0.001), ["m >= 1"]),
    "counts in one row": (lambda: RecordedCounts([1, 2]), ["counts", "[B, C]", "(2,)"]),
    "counts negative": (lambda: RecordedCounts([[1, -2]]), ["counts", ">= 0", "-2"]),
    "counts real": (lambda: RecordedCounts([[1.0, 2.0]]), ["counts", "whole", "float64"]),
    "counts empty": (lambda: RecordedCounts(np.zeros((0, 3), dtype=int)), ["counts", "(0, 3)"]),
    "counts beyond 63 bits": (
        lambda: RecordedCounts(np.array([[2**63, 1]], dtype=np.uint64)),
        ["counts", "below 2^63"],
    ),
    "counts that numpy cannot draw from": (
        lambda: RecordedCounts([[5, 5], [600_000_000, 400_000_000]]),
        ["counts", "fewer than 1e+09 votes", "got 1e+09", "shorter record"],
    ),
    "index of the wrong length": (
        lambda: RecordedCounts([[1, 2]], index=[0, 1]),
        ["index", "1 whole numbers", "(2,)"],
    ),
    "index of a replay negative": (
        lambda: RecordedCounts([[1, 2]], index=[-1]),
        ["index", ">= 0", "-1"],
    ),
    "seed of a replay negative": (lambda: RecordedCounts([[1, 2]], seed=-1), ["seed", "-1"]),
    "seed of a replay of 33 bits": (
        lambda: RecordedCounts([[1, 2]], seed=2**32),
        ["seed", "4294967296"],
    ),
    "seed of a replay none": (lambda: RecordedCounts([[1, 2]], seed=None), ["seed", "None"]),
    "probabilities in one row": (lambda: SimulatedCounts([0.5, 0.5]), ["probabilities", "[B, C]"]),
    "probabilities that do not sum to 1": (
        lambda: SimulatedCounts([[0.5, 0.6]]),
        ["probabilities", "sum to 1", "1.1"],
    ),
    "probabilities negative": (
        lambda: SimulatedCounts([[1.5, -0.5]]),
        ["probabilities", ">= 0", "-0.5"],
    ),
    "probabilities NaN": (lambda: SimulatedCounts([[math.nan, 1.0]]), ["probabilities"]),
    "p_lower above 1": (lambda: Gaussian(0.5).radius(1.5), ["p_lower", "[0, 1]", "1.5"]),
    "p_lower NaN": (lambda: Gaussian(0.5).radius([0.9, math.nan]), ["p_lower", "nan"]),
    "p_a negative": (lambda: cohen_radius(-0.1, 0.1, 0.5), ["p_a", "[0, 1]"]),
    "p_b NaN": (lambda: lecuyer_radius(0.8, math.nan, 0.5), ["p_b", "nan"]),
    "p_a and p_b above 1": (lambda: li_radius(0.8, 0.4, 0.5), ["p_a + p_b", "at most 1", "1.2"]),
    # Noise and radii.
    "sigma 0": (lambda: Gaussian(0), ["sigma", "> 0", "0"]),
    "sigma of denormal size": (lambda: Gaussian(1e-50), ["sigma", "> 0", "1e-50"]),
    "sigma negative": (lambda: Gaussian([0.5, -0.25]), ["sigma", "> 0", "-0.25"]),
    "sigma NaN": (lambda: Gaussian(math.nan), ["sigma", "finite", "nan"]),
    "sigma infinite": (lambda: cohen_radius(0.8, 0.1, math.inf), ["sigma", "finite", "inf"]),
    "sigma text": (lambda: Gaussian("half"), ["sigma", "'half'"]),
    "sigma none": (lambda: Gaussian(None), ["sigma", "None"]),
    "sigma matrix": (lambda: Gaussian([[0.5]]), ["sigma", "one value per example"]),
    "sigma of the wrong length": (
        lambda: live(noise=Gaussian([0.1, 0.2, 0.3])),
        ["sigma", "2", "3"],
    ),
    "radius negative": (lambda: Gaussian(0.5).probability(-1.0), ["radius", ">= 0", "-1."]),
    "half negative": (lambda: Uniform(-1), ["half must", "> 0", "-1"]),
    "sigma0 negative": (lambda: optimize_sigma(network(), X, -1, 1), ["sigma0 must", "> 0", "-1"]),
    "steps negative": (
        lambda: optimize_sigma(network(), X, 0.5, -1),
        ["steps must", ">= 0", "-1"],
    ),
    "radius text": (lambda: Gaussian(0.5).probability("a"), ["radius must be a number", "'a'"]),
    "radius of a grid text": (
        lambda: certify_anytime(votes(), Gaussian(0.5), ["a"], 100, 0.001),
        ["radius must be a number", "'a'"],
    ),
    "radius true": (
        lambda: certify_at(votes(), Gaussian(0.5), True, (10, 100), 0.001, 0.001),
        ["radius must be a number", "True"],
    ),
    "radius past every probability": (
        lambda: certify_at(votes(), Gaussian(0.5), 100, (10, 100), 0.001, 0.001),
        ["radius must", "a probability below 1", "at most 4.1", "got 100"],
    ),
    "radius past every probability, anytime": (
        lambda: certify_anytime(votes(), Gaussian(0.5), [0.1, 100], 100, 0.001),
        ["radius must", "a probability below 1", "at most 4.1", "got 100"],
    ),
    "stages none": (
        lambda: certify_at(votes(), Gaussian(0.5), 0.5, (), 0.001, 0.001),
        ["stages must", "at least one", "()"],
    ),
    "share 1": (
        lambda: certify_margin(votes(), Gaussian(0.5), 10, 100, 0.001, share=1),
        ["share must", "(0, 1)", "such as 0.5"],
    ),
    "radii text": (
        lambda: metrics.certified_accuracy(certificates(), [0, 1], "a"),
        ["radii must be a number", "'a'"],
    ),
    "radius NaN": (lambda: Gaussian(0.5).probability(math.nan), ["radius", "nan"]),
    "radii negative": (
        lambda: metrics.certified_accuracy(certificates(), [0, 1], [0.5, -0.5]),
        ["radii", ">= 0", "-0.5"],
    ),
    # Labels and classes.
    "labels too few": (
        lambda: metrics.average_certified_radius(certificates(), [0]),
        ["labels", "2 whole numbers", "(1,)"],
    ),
    "labels real": (
        lambda: metrics.certified_accuracy(certificates(), [0.0, 1.0], 0.5),
        ["labels", "float64"],
    ),
    "labels negative": (lambda: certificates().frame(labels=[0, -1]), ["labels", ">= 0", "-1"]),
    "prediction of the wrong length": (
        lambda: run(n0=0, prediction=[0]),
        ["prediction", "2 whole numbers"],
    ),
    "prediction of an abstention": (
        lambda: run(n0=0, prediction=[0, -1]),
        ["prediction", ">= 0", "-1"],
    ),
    "prediction of no class for ISS": (
        lambda: iss(prediction=[0, 2]),
        ["prediction", "below 2", "got 2"],
    ),
    "n0 of an audit above n_max": (
        lambda: failure_rate(0.7, 200, SIZES),
        ["n0", "n_max = 100", "200"],
    ),
    "prediction of no class": (
        lambda: run(n0=0, prediction=[0, 2]),
        ["prediction", "below 2", "got 2"],
    ),
    # Images and networks.
    "images as numpy": (lambda: live(X.numpy()), ["x must", "torch.Tensor", "ndarray"]),
    "one image": (
        lambda: live(X[0]),
        ["x must", "[B, channels, height, width]", "x[None]", "[1, 8, 8]"],
    ),
    "no images": (lambda: live(X[:0]), ["x must", "B >= 1"]),
    "images in bytes": (
        lambda: live((X * 255).to(torch.uint8)),
        ["x must", "float32", "/ 255", "uint8"],
    ),
    "images in double": (lambda: live(X.double()), ["x must", "float32", "float64"]),
    "images up to 255": (lambda: live(X * 255), ["x must", "[0, 1]", "127.5", "255", "Normalize"]),
    "images below 0": (lambda: live(X - 1), ["x must", "[0, 1]", "-0.5"]),
    "images with a NaN": (lambda: live(X * math.nan), ["x must", "finite", "holds NaN"]),
    "images past 1 by rounding": (
        lambda: live(X + 0.5 + 2.0**-20),
        ["x must", "outside by up to 9.54e-07", "x.clamp(0, 1)", "bounded=False"],
    ),
    "images unbounded but infinite": (
        lambda: live(X / 0, bounded=False),
        ["x must", "finite", "infinite values"],
    ),
    "progress as text": (lambda: live(progress="yes"), ["progress", "None, True, False", "'yes'"]),
    "images of another shape": (
        lambda: live(torch.zeros(1, 1, 4, 4), model=live().base),
        ["x must", "(1, 8, 8)", "(1, 4, 4)"],
    ),
    "model no module": (
        lambda: live(model=lambda x: x),
        ["model must", "torch.nn.Module", "function", "forward returns logits"],
    ),
    "model by name": (
        lambda: live(model="digits-cnn-sigma0.50"),
        ["model must", "got str", "lib.zoo.model('digits-cnn-sigma0.50')"],
    ),
    "images with their channels last": (
        lambda: live(X.permute(0, 2, 3, 1), model=convolution()),
        ["model does not run", "[4, 8, 8, 1]", "x.permute(0, 3, 1, 2)"],
    ),
    "images of another size": (
        lambda: live(torch.zeros(1, 1, 16, 16)),
        ["model does not run", "[4, 1, 16, 16]", "mat1"],
    ),
    "an ensemble quantised": (
        lambda: quantize(Ensemble([network()]), X, Gaussian(0.5)),
        ["model is an Ensemble", "each of its members"],
    ),
    "argument unknown": (
        lambda: live(blok=3),
        ["argument of ModelCounts must", "'block'", "'blok'"],
    ),
    "model without classes": (
        lambda: live(model=torch.nn.Identity()),
        ["model must", "[4, classes]", "[4, 1, 8, 8]"],
    ),
    "model that mixes images": (
        lambda: live(model=mixing()),
        ["model must", "by itself", "batch norm"],
    ),
    "device": (lambda: live(device="cuda:99"), ["device", "cuda:99"]),
    "model of NaN": (
        lambda: live(model=network(math.nan)).draw([0, 7]),
        ["model", "non-finite", "7 of 7", "example 1", "float32"],
    ),
    "model of infinity": (
        lambda: live(model=network(math.inf)).draw(7),
        ["model", "non-finite", "example 0"],
    ),
    "live index negative": (lambda: live(index=[0, -1]), ["index", ">= 0"]),
    "live index too short": (lambda: live(index=[0]), ["index", "2 whole numbers"]),
    "seed of 33 bits": (lambda: live(seed=2**32), ["seed", "4294967296"]),
    "seed negative": (lambda: live(seed=-1), ["seed", "-1"]),
    "seed real": (lambda: live(seed=1.5), ["seed", "1.5"]),
    "settings of a finished engine": (
        lambda: ModelCounts(live().base, X, Gaussian(0.5), block=8),
        ["block", "BaseClassifier"],
    ),
    "dtype": (lambda: live(dtype=torch.float64), ["dtype", "float32", "float64"]),
    "layout": (lambda: live(layout="rows"), ["layout", "channels_last", "'rows'"]),
    "compile": (lambda: live(compile="yes"), ["compile", "'auto'", "'yes'"]),
    "block 0": (lambda: live(block=0), ["block", "at least 1"]),
    # Records, models, data, training.
    "saved counts real": (
        lambda: save_counts("never", [[1.5]], [0], [0]),
        ["counts", "whole", "float64"],
    ),
    "saved index too long": (
        lambda: save_counts("never", [[1]], [0, 1], [0]),
        ["index", "1 whole numbers"],
    ),
    "saved labels negative": (lambda: save_counts("never", [[1]], [0], [-1]), ["labels", ">= 0"]),
    "log of other draws": (
        lambda: counts_from_log(LOG, Gaussian(0.1), 100, 0.001),
        ["log", "radius 0.5", "n = 100", "alpha = 0.001", "sigma"],
    ),
    "log without a line": (
        lambda: counts_from_log(LOG[:0], Gaussian(0.1), 100, 0.001),
        ["log", "no examples"],
    ),
    "log with n 0": (
        lambda: counts_from_log(LOG, Gaussian(0.5), 0, 0.001),
        ["n must", "at least 1"],
    ),
    "log with another count taken": (
        lambda: counts_from_log(LOG, Gaussian(0.5), 100, 0.001, take="highest"),
        ["take", "'middle'", "'lowest'", "'highest'"],
    ),
    "log with alpha 2": (lambda: counts_from_log(LOG, Gaussian(0.5), 100, 2), ["alpha", "(0, 1)"]),
    "architecture unknown": (
        lambda: build("transformer", "digits"),
        ["architecture", "small_cnn", "'transformer'"],
    ),
    "data unknown": (lambda: build("mlp", "stars"), ["data", "digits", "'stars'"]),
    "data set unknown": (lambda: load("stars", "train"), ["name", "digits", "'stars'"]),
    "split unknown": (lambda: load("digits", "dev"), ["split", "'test'", "'dev'"]),
    "training images up to 255": (lambda: train(X * 255), ["x must", "[0, 1]"]),
    "training labels too few": (lambda: train(y=Y[:1]), ["y must", "2 whole numbers"]),
    "training labels out of range": (
        lambda: train(y=torch.tensor([0, 3])),
        ["y must", "below 3", "got 3"],
    ),
    "training seed": (lambda: train(seed=-1), ["seed", "-1"]),
    "training dtype": (lambda: train(dtype=torch.float16), ["dtype", "bfloat16", "float16"]),
    "epochs 0": (lambda: train(epochs=0), ["epochs", "at least 1"]),
    "batch real": (lambda: train(batch=1.5), ["batch", "whole", "1.5"]),
    "training that diverges": (lambda: train(lr=1e30, epochs=4), ["diverged", "lower lr", "1e+30"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, parts = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message


if __name__ == "__main__":
    for name, (call, _) in BAD.items():
        try:
            call()
        except ValueError as error:
            print(f"{name}: {error}")
        else:
            print(f"{name}: ACCEPTED")
