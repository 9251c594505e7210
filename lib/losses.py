"""Training losses, each called as `loss(model, x, y, noise, generator) -> scalar tensor`.

Every loss is a frozen dataclass whose fields are its hyper-parameters, with the papers' values for
CIFAR-10 as defaults, registered under a name. A loss of your own needs only such a call; registered
with `register`, it and its fields become options of the command line. Two more things are optional:

- `passes`: int, how often one step passes the batch forward and backward through the network.
- `at(progress)`: the loss of an epoch that ends at the fraction `progress` in (0, 1] of the
  training. The training loop asks once per epoch.

The arguments of every call:

- model: nn.Module, logits [B, classes] from images [B, channels, height, width].
- x: float images [B, channels, height, width] in [0, 1], without noise.
- y: int64 labels [B].
- noise: the smoothing distribution trained for; one sigma per example is allowed.
- generator: source of all randomness of the call (as `noise.sample` takes it).
"""

import dataclasses
import functools
import math

import torch
from torch.nn import functional

from lib.attacks import ddn, normalised, pgd, within
from lib.checks import check_choice, check_draws
from lib.engine.admission import evaluating
from lib.engine.copies import additive, fresh_logits, log_mean_softmax, logits_of_copies
from lib.models import load_checkpoint
from lib.noise import Gaussian
from lib.store.registry import Registry, option

LOSSES = Registry("loss", needs=("__call__",))
register = LOSSES.register
ATTACKS, TRAIN = ("pgd", "ddn"), ("each", "mean")


@register("gaussian")
@dataclasses.dataclass(frozen=True)
class GaussianLoss:
    """Cross-entropy under Gaussian data augmentation (Cohen et al. 2019, section 3.3, appendix F).

    By Jensen's inequality, its negative bounds from below the log of the mean softmax (equation
    18), which stands in for the log-probability that the noisy image is classified correctly (17).

    - smoothing: label smoothing in [0, 1).
    - m: noisy copies of each image.
    """

    smoothing: float = option(0.0, "Label smoothing in [0, 1).")
    m: int = option(1, "Noisy copies of each image.")

    def __post_init__(self):
        _check_range(0, 1, smoothing=self.smoothing)
        check_draws(m=self.m)

    @property
    def passes(self):
        return self.m

    def __call__(self, model, x, y, noise, generator):
        logits = fresh_logits(model, x, noise, generator, self.m)
        return _cross_entropy(logits, y, self.smoothing).mean()


@register("stability")
@dataclasses.dataclass(frozen=True)
class StabilityLoss:
    """Stability training: cross-entropy of the clean image, and its predictions kept under noise.

        CE(f(x), y) + lbd H(softmax f(x), softmax f(x + eps)),    H(p, q) = -sum_c p_c log q_c

    (Li et al. 2019, after Zheng et al. 2016; checked against the baseline in the published code of
    Jeong and Shin 2020, in which the gradient also flows through the clean prediction. The text
    of Li et al. was not at hand.)

    - lbd: weight of the stability term, >= 0.
    """

    lbd: float = option(2.0, "Weight of the stability term.")

    def __post_init__(self):
        _check_range(0, math.inf, lbd=self.lbd)

    @property
    def passes(self):
        return 2

    def __call__(self, model, x, y, noise, generator):
        # Two passes: batch norms see clean and noisy images apart, as in the published code.
        clean = logits_of_copies(model, x, 1)[:, 0]
        noisy = fresh_logits(model, x, noise, generator, 1)[:, 0]
        stability = functional.cross_entropy(noisy, clean.softmax(dim=1))
        return functional.cross_entropy(clean, y) + self.lbd * stability


@register("macer")
@dataclasses.dataclass(frozen=True)
class MacerLoss:
    """MACER: the mean-softmax loss, and a hinge on the certified radius (Zhai et al. 2020).

    With p = mean over k noisy copies of softmax f, and p' = the same of softmax (beta f):

        -log p_y + lbd sigma/2 max(gamma - xi, 0) [y is the top class of p'],
        xi = Phi^-1(p'_y) - Phi^-1(largest other p'),

    so that sigma/2 xi is the radius of the smoothed soft classifier, and images that are wrong, or
    already certified beyond gamma sigma/2, have no radius term. Checked against the published code.

    - lbd: weight of the radius term, >= 0 (CIFAR-10: 12).
    - k: noisy copies of each image.
    - beta: inverse temperature of the softmax in the radius term, > 0.
    - gamma: the hinge, in units of sigma/2.
    - deferred: fraction of the training with lbd = 0 (Zhai et al. at sigma 1: until the first decay
      of the learning rate).

    Raises ValueError naming noise where it is not Gaussian (an l2 radius).
    """

    lbd: float = option(12.0, "Weight of the radius term.")
    k: int = option(16, "Noisy copies of each image.")
    beta: float = option(16.0, "Inverse temperature of the radius term's softmax.")
    gamma: float = option(8.0, "Hinge of the radius term, in units of sigma/2.")
    deferred: float = option(0.0, "Fraction of the training without the radius term.")

    def __post_init__(self):
        check_draws(k=self.k)
        _check_range(0, math.inf, lbd=self.lbd, beta=self.beta, gamma=self.gamma)
        _check_range(0, 1, deferred=self.deferred)

    @property
    def passes(self):
        return self.k

    def at(self, progress):
        """The loss of an epoch that ends at `progress`: no radius term while deferred."""
        lbd = 0.0 if progress <= self.deferred else self.lbd
        return dataclasses.replace(self, lbd=lbd, deferred=0.0)

    def __call__(self, model, x, y, noise, generator):
        if not isinstance(noise, Gaussian):
            raise ValueError(f"noise must be Gaussian for MACER's radius; got {noise}")
        logits = fresh_logits(model, x, noise, generator, self.k)
        loss = functional.nll_loss(log_mean_softmax(logits), y)
        if self.lbd:
            sigma = torch.as_tensor(noise.sigma, dtype=logits.dtype, device=logits.device)
            loss = loss + self.lbd * (sigma / 2 * self._hinge(logits, y)).mean()
        return loss

    def _hinge(self, logits, y):
        """max(gamma - xi, 0) of each example, 0 where its top class is wrong: [B]."""
        top, index = (self.beta * logits).softmax(dim=2).mean(dim=1).topk(2, dim=1)
        with torch.no_grad():
            xi = torch.special.ndtri(top[:, 0]) - torch.special.ndtri(top[:, 1])
            # Chosen before the differentiable step: Phi^-1 has no finite gradient at 0 and 1.
            rows = ((index[:, 0] == y) & (xi < self.gamma)).nonzero()[:, 0]
        xi = torch.special.ndtri(top[rows, 0]) - torch.special.ndtri(top[rows, 1])
        return torch.zeros_like(top[:, 0]).index_put((rows,), self.gamma - xi)


@register("consistency")
@dataclasses.dataclass(frozen=True)
class ConsistencyLoss:
    """Cross-entropy, and predictions that agree over the noise (Jeong and Shin 2020).

    With p_i = softmax f(x + eps_i) and p = their mean over m copies:

        mean_i CE(f(x + eps_i), y) + lbd mean_i KL(p, p_i) + eta H(p).

    Checked against the published code. lbd = eta = 0 is GaussianLoss with m copies.

    - lbd: weight of the divergence, >= 0 (CIFAR-10: 20 at sigma 0.25, 10 at 0.5 and 1).
    - eta: weight of the entropy, >= 0.
    - m: noisy copies of each image.
    """

    lbd: float = option(10.0, "Weight of the divergence between the copies.")
    eta: float = option(0.5, "Weight of the entropy of their mean.")
    m: int = option(2, "Noisy copies of each image.")

    def __post_init__(self):
        _check_range(0, math.inf, lbd=self.lbd, eta=self.eta)
        check_draws(m=self.m)

    @property
    def passes(self):
        return self.m

    def __call__(self, model, x, y, noise, generator):
        logits = fresh_logits(model, x, noise, generator, self.m)
        return (_cross_entropy(logits, y) + _consistency(logits, self.lbd, self.eta)).mean()


@register("smoothadv")
@dataclasses.dataclass(frozen=True)
class SmoothAdvLoss:
    """SmoothAdv: cross-entropy on images attacked under the noise (Salman et al. 2019).

    For each image, an attack of norm at most epsilon raises

        -log mean_i softmax f(x + delta + eps_i)_y

    over m noises, which stay fixed through the attack and are those of the loss. PGD takes steps of
    2 epsilon / steps along the normalised gradient. DDN (Rony et al. 2019) searches for the least
    delta that makes most of the m copies wrong, and leaves an image alone if it finds none.
    x + delta stays in [0, 1]. The attack runs on the network in eval mode (batch norms use their
    running statistics); the loss itself runs in the mode that the network came in.

    Checked against the published code. Three differences: where a gradient is exactly 0, the attack
    stays in place (there: a random direction); DDN does not round to 256 grey levels; a step takes
    m copies of a whole batch (there: the batch is split into m parts, one step each).

    - epsilon: largest l2 norm of the attack, in pixels in [0, 1].
    - steps: steps of the attack, each a forward and a backward pass.
    - m: noisy copies of each image.
    - warmup: fraction of the training over which epsilon grows linearly from 0 (10 of 150 epochs).
    - attack: "pgd" or "ddn".
    - train: what is minimised on the attacked copies, "each": the mean of their cross-entropies
      (as published); "mean": -log of their mean softmax, the attack's own objective.
    - gamma: DDN's relative change of the norm per step.
    """

    epsilon: float = option(1.0, "Largest l2 norm of the attack, pixels in [0, 1].")
    steps: int = option(10, "Steps of the attack.")
    m: int = option(4, "Noisy copies of each image.")
    warmup: float = option(10 / 150, "Fraction of the training over which epsilon grows.")
    attack: str = option("pgd", "Attack.", ATTACKS)
    train: str = option("each", "Cross-entropy of each copy, or of their mean softmax.", TRAIN)
    gamma: float = option(0.05, "Relative change of the norm per step of ddn.")

    def __post_init__(self):
        check_draws(steps=self.steps, m=self.m)
        _check_range(0, math.inf, epsilon=self.epsilon)
        _check_range(0, 1, warmup=self.warmup, gamma=self.gamma)
        check_choice(ATTACKS, attack=self.attack)
        check_choice(TRAIN, train=self.train)

    @property
    def passes(self):
        return self.m * (self.steps + 1)

    def at(self, progress):
        """The loss of an epoch that ends at `progress`: epsilon of the warm-up."""
        share = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return dataclasses.replace(self, epsilon=share * self.epsilon, warmup=0.0)

    def __call__(self, model, x, y, noise, generator):
        return self._outer(self._attacked(model, x, y, noise, generator), y).mean()

    def _attacked(self, model, x, y, noise, generator):
        """Logits [B, m, classes] of the attacked images under the m noises of the attack."""
        eps = additive(x, noise, generator, self.m)
        delta = torch.zeros_like(x)
        if self.epsilon:
            search = pgd if self.attack == "pgd" else functools.partial(ddn, gamma=self.gamma)
            delta = search(model, x, y, eps, self.epsilon, self.steps)
        return logits_of_copies(model, (x + delta).repeat_interleave(self.m, dim=0) + eps, self.m)

    def _outer(self, logits, y):
        if self.train == "mean":
            return functional.nll_loss(log_mean_softmax(logits), y, reduction="none")
        return _cross_entropy(logits, y)


@register("smoothadv-consistency")
@dataclasses.dataclass(frozen=True)
class SmoothAdvConsistencyLoss(SmoothAdvLoss):
    """Consistency on top of SmoothAdv: both terms on the attacked copies (Jeong and Shin 2020).

    - lbd, eta: as ConsistencyLoss (CIFAR-10: lbd 2 with m 4 at sigma 0.25; lbd 1 with m 2 and
      epsilon 2 at sigma 0.5 and 1).

    The other fields are SmoothAdvLoss's.
    """

    lbd: float = option(2.0, "Weight of the divergence between the copies.")
    eta: float = option(0.5, "Weight of the entropy of their mean.")

    def __post_init__(self):
        super().__post_init__()
        _check_range(0, math.inf, lbd=self.lbd, eta=self.eta)

    def __call__(self, model, x, y, noise, generator):
        logits = self._attacked(model, x, y, noise, generator)
        return (self._outer(logits, y) + _consistency(logits, self.lbd, self.eta)).mean()


@register("cat-rs")
@dataclasses.dataclass(frozen=True)
class CatRsLoss:
    """Confidence-aware training, CAT-RS (Jeong, Kim and Shin 2023).

    Of the m noisy copies of an image, let q be the share that is classified correctly, and K >= 1 a
    draw from Binomial(m, q). An image takes part with its K copies of least loss:

        low  = 1/m sum of the K smallest CE(f(x + eps_i), y),
        high = max_i KL(target, softmax f(x + eps'_i)) [K = m],    loss = low + lbd high,

    where eps'_i is an attack on the noise: `steps` steps of length 2 epsilon / steps raise these
    divergences, within l2 distance epsilon of eps_i; each step then restores the mean and the mean
    square of the noise. As in SmoothAdvLoss, the attack runs on the network in eval mode.

    Checked against the published code; the paper's text was not at hand. One difference: there the
    target is the share of 10,000 votes that a network trained with Gaussian noise gives to each
    class of the clean training image; here it is the mean softmax over the same m copies, of such a
    network or of the one in training.

    - lbd: weight of `high`, >= 0 (published for CIFAR-100: 0.5, 1, 2 at sigma 0.25, 0.5, 1).
    - epsilon: l2 norm of the attack, in pixels in [0, 1].
    - steps: steps of the attack.
    - m: noisy copies of each image.
    - teacher: checkpoint of a network trained with Gaussian noise; "": the network in training.
    """

    lbd: float = option(1.0, "Weight of the worst divergence.")
    epsilon: float = option(1.0, "Largest l2 norm of the attack, pixels in [0, 1].")
    steps: int = option(4, "Steps of the attack.")
    m: int = option(4, "Noisy copies of each image.")
    teacher: str = option(
        "",
        "Checkpoint of a network trained with noise: gives the target (else the one in training).",
    )

    def __post_init__(self):
        check_draws(steps=self.steps, m=self.m)
        _check_range(0, math.inf, lbd=self.lbd, epsilon=self.epsilon)

    @property
    def passes(self):
        # A teacher adds m passes forward.
        return self.m * (self.steps + 2)

    def __call__(self, model, x, y, noise, generator):
        eps = additive(x, noise, generator, self.m)
        copies = x.repeat_interleave(self.m, dim=0)
        logits = logits_of_copies(model, copies + eps, self.m)
        target = self._target(logits, copies + eps)
        accept = self._accepted(logits, y, generator)
        losses = _each_cross_entropy(logits, y).sort(dim=1).values
        low = (losses * (torch.arange(self.m, device=x.device) < accept[:, None])).mean(dim=1)
        attacked = copies + self._attack(model, copies, eps, target)
        high = _divergence(target, logits_of_copies(model, attacked, self.m)).amax(dim=1)
        return (low + self.lbd * high * (accept == self.m)).mean()

    @torch.no_grad()
    def _target(self, logits, noisy):
        """Class probabilities [B, classes] that `high` holds the attacked copies to."""
        if self.teacher:
            logits = logits_of_copies(_teacher(self.teacher, noisy.device), noisy, self.m)
        return logits.softmax(dim=2).mean(dim=1)

    @torch.no_grad()
    def _accepted(self, logits, y, generator):
        """K of each example: int64 [B] in 1..m."""
        share = (logits.argmax(dim=2) == y[:, None]).double().mean(dim=1, keepdim=True)
        uniform = torch.rand(logits.shape[:2], generator=generator, device=y.device)
        return (uniform < share).sum(dim=1).clamp_min(1)

    def _attack(self, model, copies, eps, target):
        """Noise [B m, ...] at which the predictions leave the target."""
        attacked, (mean, size) = eps, _moments(eps)
        for _ in range(self.steps if self.epsilon else 0):
            with evaluating(model), torch.enable_grad():
                attacked = attacked.detach().requires_grad_()
                logits = logits_of_copies(model, copies + attacked, self.m)
                objective = _divergence(target, logits).sum()
                direction = normalised(torch.autograd.grad(objective, attacked)[0])
            step = 2 * self.epsilon / self.steps * direction
            attacked = eps + within(attacked.detach() + step - eps, self.epsilon)
            now, scale = _moments(attacked)
            attacked = mean + (attacked - now) / scale * size
        return attacked


def _check_range(low, high, **values):
    """Each keyword is a finite number in [low, high)."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not low <= value < high:
            raise ValueError(f"{name} must be a number in [{low}, {high}); got {value!r}")


def _each_cross_entropy(logits, y, smoothing=0.0):
    """Cross-entropy of each copy: [B, m]."""
    labels = y[:, None].expand(logits.shape[:2])
    classes_second = logits.transpose(1, 2)
    return functional.cross_entropy(
        classes_second, labels, reduction="none", label_smoothing=smoothing
    )


def _cross_entropy(logits, y, smoothing=0.0):
    """Mean cross-entropy of the copies of each example: [B]."""
    return _each_cross_entropy(logits, y, smoothing).mean(dim=1)


def _divergence(target, logits):
    """KL(target, softmax) of each copy: [B, m] from targets [B, classes]."""
    log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
    return (target[:, None] * (log_target[:, None] - logits.log_softmax(dim=2))).sum(dim=2)


def _consistency(logits, lbd, eta):
    """lbd mean_i KL(p, p_i) + eta H(p) of each example, p the mean of the p_i: [B]."""
    log_mean = log_mean_softmax(logits)
    mean = log_mean.exp()
    divergence = (mean[:, None] * (log_mean[:, None] - logits.log_softmax(dim=2))).sum(dim=2)
    return lbd * divergence.mean(dim=1) - eta * (mean * log_mean).sum(dim=1)


def _moments(images):
    """Mean, and root of the mean square, of each image."""
    shape = (-1, *[1] * (images.ndim - 1))
    flat = images.flatten(1)
    return flat.mean(dim=1).view(shape), flat.square().mean(dim=1).sqrt().view(shape)


@functools.lru_cache(maxsize=4)
def _teacher(path, device):
    return load_checkpoint(path)[0].to(device).eval()
