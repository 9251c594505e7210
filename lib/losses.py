"""Training losses: each `loss(model, x, y, noise, generator) -> scalar` on clean images in [0, 1].

A loss of your own is one registered frozen dataclass: its fields become options of the command line.
"""

import dataclasses

from torch.nn import functional

from lib.store.registry import Registry, option

LOSSES = Registry("loss")
register = LOSSES.register


@register("gaussian")
@dataclasses.dataclass(frozen=True)
class GaussianLoss:
    """Cross-entropy under Gaussian data augmentation (Cohen et al. 2019, 3.3 and appendix F).

    One noisy copy of each image. By Jensen's inequality it bounds from below what training should
    maximise, the log-probability that the noisy image is classified right (equations 17 and 18).

    - smoothing: label smoothing in [0, 1).
    """

    smoothing: float = option(0.0, "Label smoothing in [0, 1).")

    def __call__(self, model, x, y, noise, generator):
        logits = model(noise.sample(x, generator)).float()
        return functional.cross_entropy(logits, y, label_smoothing=self.smoothing)
