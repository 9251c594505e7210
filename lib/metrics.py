"""What the papers report of a set of certificates, and tables of it over several runs."""

import numpy as np
import pandas as pd

from lib.certify import certify
from lib.checks import check_labels, check_numbers
from lib.iss import certify_iss, decline


def average_certified_radius(certificates, labels):
    """ACR: the mean radius, counted 0 where abstained or wrong; in the noise's units.

    Zhai et al. 2020; Chen et al. 2022, equation 7.

    - certificates: Certificates of B >= 1 examples. labels: int [B].

    Raises ValueError naming labels.
    """
    return float(np.mean(right_radius(certificates, labels)))


def right_radius(certificates, labels):
    """The radius of each example, 0 where abstained or wrong: float64 [B], in the noise's units.

    Arguments and errors as of `average_certified_radius`.
    """
    labels = check_labels(labels, len(certificates))
    return np.where(certificates.prediction == labels, certificates.radius, 0.0)


def paired_gain(after, before, labels):
    """Difference of two ACRs on the same examples, and its standard error over examples.

    Pairing takes out how much examples differ, which is far more than two classifiers differ on
    one of them.

    - after, before: Certificates of the same B >= 2 examples. labels: int [B].

    Returns (ACR of after - ACR of before, standard error). Raises ValueError naming after.
    """
    if len(before) != len(after) or len(after) < 2:
        raise ValueError(
            f"after must certify the same examples as before, 2 or more; got {len(after)} and "
            f"{len(before)}"
        )
    gain = right_radius(after, labels) - right_radius(before, labels)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))


def certified_accuracy(certificates, labels, radii):
    """The fraction of examples that are right and certified at radius r: their R >= r.

    The approximate certified accuracy of Cohen et al. 2019, as their published code counts it: a
    certificate speaks of the open ball of radius R, all perturbations shorter than R. So those at a
    predetermined radius count at this radius. At r = 0 it is the accuracy of the smoothed
    classifier, abstentions counted as wrong.

    - radii: a number or array, >= 0, in the units of the certificates.

    Returns float64 of the shape of radii. Raises ValueError naming labels or radii.
    """
    labels = check_labels(labels, len(certificates))
    radii = check_numbers(radii, "radii", "iuf")
    if not (radii >= 0).all():
        raise ValueError(f"radii must be >= 0, in the units of the certificates; got {radii!r}")
    right = np.where(certificates.prediction == labels, certificates.radius, -1.0)
    return (right >= radii[..., None]).mean(axis=-1)[()]


def row(certificates, labels, radii):
    """One row of the papers' tables: {"acr": ..., "r0.00": ..., ...}, accuracies as fractions."""
    accuracy = certified_accuracy(certificates, labels, radii)
    named = {f"r{r:.2f}": float(a) for r, a in zip(radii, accuracy, strict=True)}
    return {"acr": average_certified_radius(certificates, labels)} | named


def curve(certificates, labels, radii):
    """Certified accuracy over the radius as a DataFrame, columns radius and accuracy."""
    accuracy = certified_accuracy(certificates, labels, radii)
    return pd.DataFrame({"radius": np.asarray(radii, dtype=np.float64), "accuracy": accuracy})


def abstention(certificates):
    """The fraction of examples on which the sampler abstained, in [0, 1].

    - certificates: Certificates of B >= 1 examples.
    """
    return float(np.mean(certificates.prediction < 0))


def envelope(accuracies):
    """The best certified accuracy at each radius over S noise levels: [S, R] -> [R]."""
    return np.max(np.asarray(accuracies), axis=0)


def max_absolute_decline(before, after):
    """MAD: the largest radius that any example lost between two sets of certificates.

    Chen et al. 2022, section on metrics. It includes the Monte Carlo error of both runs;
    `lib.iss.decline` is the loss without it.

    - before, after: Certificates of the same examples; an abstention counts as radius 0.

    Returns a radius in the noise's units. Raises ValueError naming after.
    """
    if len(before) != len(after):
        raise ValueError(
            f"after must certify the same {len(before)} examples as before; got {len(after)}"
        )
    return float(np.max(before.radius - after.radius))


def average_sample_size(certificates):
    """The mean number of draws per example, selection draws included.

    - certificates: Certificates of B >= 1 examples.
    """
    return float(np.mean(certificates.n))


def speed_up(certificates, n):
    """How many times fewer draws these certificates took than n of every example.

    - certificates: Certificates of B >= 1 examples, with at least one draw among them.
    - n: draws of the standard certification, > 0, selection draws included.

    Raises ValueError naming n.
    """
    if not n > 0:
        raise ValueError(
            f"n must be a number of draws > 0, of the standard certification; got {n!r}"
        )
    return float(n / np.mean(certificates.n))


def iss_beside_ias(make, sizes, labels, p, radii, known=None, reuse=True, first=0.01, replays=20):
    """Input-specific sampling and the same number of draws for every example, side by side.

    The form of the tables of Chen et al. (2022): the second row (IAS) gives each example the
    average number of draws of the first (ISS). Means over replays.

    - make: seed -> source of votes of B examples.
    - sizes: the SampleSizeMap of ISS; its noise and alpha are those of both rows.
    - labels: int [B]. p: float [B], the probabilities at which the decline is computed.
    - radii: of the certified accuracies. known: int [B], classes given beforehand.
    - reuse: whether ISS counts its first draws again (the paper's form).
    - first: draws of the first stage, as a share of n_max. replays: seeds 0, 1, ...

    Returns a DataFrame with the rows ISS and IAS: draws (average), mad (largest decline of any
    example at its p), acr, and r0.50 etc. (certified accuracies).
    """
    n0, choose = max(1, int(first * sizes.n_max)), 0 if known is not None else 100
    rows = []
    for seed in range(replays):
        settings = (sizes.noise, n0, sizes.n_max, sizes, sizes.alpha, reuse, known)
        iss = certify_iss(make(seed), *settings)
        even = round(average_sample_size(iss)) - choose
        ias = certify(make(seed), sizes.noise, choose, even, sizes.alpha, known)
        for name, found, apart in (("ISS", iss, 0 if reuse else n0), ("IAS", ias, choose)):
            # Without a bound (an abstention after the first stage) the whole radius is lost.
            used = np.where(found.p_lower > 0, found.n - apart, 0)
            lost = decline(used, sizes.n_max, p, sizes.noise, sizes.alpha)
            accuracy = certified_accuracy(found, labels, radii)
            row = {"draws": average_sample_size(found), "mad": lost.max()}
            row["acr"] = average_certified_radius(found, labels)
            row |= {f"r{r:.2f}": share for r, share in zip(radii, accuracy, strict=True)}
            rows.append({"method": name} | row)
    return pd.DataFrame(rows).groupby("method", sort=False).mean().reset_index()


def summarize(logs, radii=None):
    """A table of certification logs, one row each.

    - logs: {name: DataFrame of `lib.store.logs.read_log`}.
    - radii: of the certified accuracies; default 0, 0.25, ... up to the largest radius, included.

    Returns a DataFrame indexed by `log`, with columns
    - examples, and ACR (in the logs' units);
    - of several logs gain and s.e.: the ACR over that of the first log on the examples that both
      hold, and its standard error (NaN where they share fewer than 2, or a label differs);
    - abstained (a fraction), draws, the mean number per example (NaN where a log does not say), and
      seconds per example;
    - named by its radius, each certified accuracy.

    Raises ValueError on an empty log.
    """
    for name, log in logs.items():
        if not len(log):
            raise ValueError(f"{name} holds no examples yet")
    if radii is None:
        largest = max(log["radius"].max() for log in logs.values())
        radii = np.arange(0, np.nextafter(largest, np.inf), 0.25)
    rows, first = {}, next(iter(logs.values()))
    for name, log in logs.items():
        certificates = as_certificates(log)
        accuracy = certified_accuracy(certificates, log["label"], radii)
        rows[name] = {
            "examples": len(log),
            "ACR": average_certified_radius(certificates, log["label"]),
            **(_gain(log, first) if len(logs) > 1 else {}),
            "abstained": abstention(certificates),
            "draws": float(log["n"].mean()) if "n" in log else np.nan,
            "seconds": float(log["time"].mean()),
        } | {f"{r:.12g}": a for r, a in zip(radii, accuracy, strict=True)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("log")


def _gain(log, first):
    """The paired gain of a log over the first one, NaN where it is that one or not comparable."""
    shared = log.merge(first, on="idx", suffixes=("", "_before"))
    before = shared[["predict_before", "radius_before"]].rename(columns=lambda c: c.split("_")[0])
    gain = np.nan, np.nan
    if log is not first and len(shared) > 1 and (shared.label == shared.label_before).all():
        gain = paired_gain(as_certificates(shared), as_certificates(before), shared.label)
    return dict(zip(("gain", "s.e."), gain, strict=True))


def as_certificates(log):
    """A log with its class under the name that Certificates give it, for the metrics above."""
    return log.rename(columns={"predict": "prediction"})


def formatted(table):
    """A summary as text: three decimals, whole numbers as such, a dash where a log does not say."""
    return pd.DataFrame({c: [_cell(c)(v) for v in table[c]] for c in table}, index=table.index)


def latex(table):
    """A summary as LaTeX (booktabs), the best ACR and the best accuracy at each radius in bold."""
    radii = [column for column in table if column[0].isdigit()]
    style = table.reset_index().style.hide(axis="index")
    style = style.format({column: _cell(column) for column in table}, escape="latex")
    style = style.format_index(lambda c: f"$r = {c}$" if c in radii else c, axis=1)
    if len(table) > 1:
        style = style.highlight_max(subset=["ACR", *radii], props="textbf:--rwrap;")
    return style.to_latex(hrules=True, column_format="l" + "r" * table.shape[1])


def _cell(column):
    digits = {"examples": ",.0f", "draws": ",.0f", "seconds": ".3g"}.get(column, ".3f")
    return lambda value: "-" if np.isnan(value) else format(value, digits)
