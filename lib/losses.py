"""Training losses: each `loss(model, x, y, noise, generator) -> scalar tensor` on clean images x in [0, 1]."""

import dataclasses

from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class GaussianLoss:
    """Cross-entropy under Gaussian data augmentation: one noisy copy of each image (Cohen et al. 2019, section 3.3 and appendix F).

    By Jensen's inequality it bounds from below what training should maximise, the log-probability that the noisy image is classified right
    (equations 17 and 18). smoothing: label smoothing in [0, 1).
    """

    smoothing: float = 0.0

    def __call__(self, model, x, y, noise, generator):
        return functional.cross_entropy(
            model(noise.sample(x, generator)).float(), y, label_smoothing=self.smoothing
        )
