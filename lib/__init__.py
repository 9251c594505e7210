"""Randomized smoothing: certified robustness of any classifier by voting under noise."""

from lib.adaptive import certify_anytime, certify_at, last_stage_size
from lib.audit import audit, verdict
from lib.bounds import (
    certified_accuracy_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    top_class_pvalue,
)
from lib.certify import (
    ABSTAIN,
    Certificates,
    certify,
    certify_margin,
    certify_partition,
    predict,
)
from lib.counts import RecordedCounts, SimulatedCounts
from lib.dual import certify_dual
from lib.engine.classifier import BaseClassifier
from lib.engine.int8 import quantize
from lib.engine.live import ModelCounts
from lib.ensemble import Ensemble
from lib.iss import SampleSizeMap, certify_iss, sample_size_map
from lib.memory import CertificateMemory
from lib.noise import Ablation, Gaussian, Uniform
from lib.sigma import optimize_sigma
from lib.staircase import certify_staircase
from lib.theory import cohen_radius, lecuyer_radius, li_radius

__all__ = [
    "ABSTAIN",
    "Ablation",
    "BaseClassifier",
    "CertificateMemory",
    "Certificates",
    "Ensemble",
    "Gaussian",
    "ModelCounts",
    "RecordedCounts",
    "SampleSizeMap",
    "SimulatedCounts",
    "Uniform",
    "audit",
    "certified_accuracy_lower",
    "certify",
    "certify_anytime",
    "certify_at",
    "certify_dual",
    "certify_iss",
    "certify_margin",
    "certify_partition",
    "certify_staircase",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "cohen_radius",
    "last_stage_size",
    "lecuyer_radius",
    "li_radius",
    "optimize_sigma",
    "predict",
    "quantize",
    "sample_size_map",
    "top_class_pvalue",
    "verdict",
]
__version__ = "0.1.0"
