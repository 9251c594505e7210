"""8-bit networks: static quantisation, done once, and where they are compiled to 8-bit products."""

import contextlib
import copy
import logging
import warnings

import torch

from lib.checks import check_draws, check_images, check_seed
from lib.engine.folding import folded
from lib.engine.hardware import cores, has_compiler, has_int8_products
from lib.ensemble import Ensemble
from lib.store.programs import Program, program_of

BLOCK = 64  # images per calibration pass: the observers' averages depend on it


def quantize(model, images, noise, seed=0):
    """The 8-bit version of a network, a new network of its own: integer weights, 8-bit activations.

    Static post-training quantisation (Jacob et al. 2018) by torchao's PT2E flow with the quantizer
    for x86 CPUs: weights to int8 with one scale per output channel, activations to uint8 with one
    scale and zero point per tensor, found on noisy images. Scales depend on how the images are
    split into blocks, so they are part of the network: quantise once, store the result
    (`save_checkpoint`), and certify what was stored. A certificate of the 8-bit network is about
    the 8-bit network, and says nothing of the one that it was made from.

    - model: nn.Module, logits from float images in [0, 1], normalisation inside. Not changed.
    - images: float32 [N, channels, height, width] in [0, 1], of the training set: about 1,000.
    - noise: smoothing distribution that the network will be certified under.
    - seed: of the noise, whole number >= 0.

    Returns a Program, which BaseClassifier takes as any network. Raises ValueError naming images
    or seed, of an Ensemble (its members can be quantised), or where torch cannot export the network
    or finds nothing in it to quantise.
    """
    check_images(images)
    check_draws(images=len(images))
    check_seed(seed)
    if isinstance(model, Program):
        raise ValueError("model is an 8-bit network already: give the one that it was made from")
    if isinstance(model, Ensemble):
        raise ValueError(
            "model is an Ensemble, which cannot be quantised as one: quantise each of its members, "
            "and make an Ensemble of these"
        )
    shape = tuple(images.shape[1:])
    with cores(1), torch.no_grad():
        network = folded(copy.deepcopy(model).cpu().eval().float(), shape)
        noisy = noise.sample(images, torch.Generator().manual_seed(seed))
        try:
            converted = _converted(network, noisy)
            program = program_of(converted, shape)
        except (
            Exception
        ) as error:  # tracing runs the user's code: what that raises is anyone's guess
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ValueError(f"model cannot be quantised: {reason}") from error
    if not program.integers():
        raise ValueError(
            "model cannot be quantised: it has no convolution or linear layer that torchao knows"
        )
    return program.eval()


def _converted(network, noisy):
    """The network exported for any batch size, calibrated on noisy images, and converted."""
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batch = ({0: torch.export.Dim("batch", min=2)},)
        example = torch.zeros(2 * BLOCK, *noisy.shape[1:])
        exported = torch.export.export(network, (example,), dynamic_shapes=batch).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for block in noisy.split(BLOCK):
            prepared(block)
        return convert_pt2e(prepared)


@contextlib.contextmanager
def _quiet():
    """Without what torchao and torch say of themselves on import: libraries for GPUs, renamings."""

    said = ("Failed to load", "is an Enum subclass", "Detected no triton")
    names = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]

    def known(record):
        return not any(text in record.getMessage() for text in said)

    for logger in loggers:
        logger.addFilter(known)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(known)


def check_int8(model, shape, dtype):
    """A network is 8-bit if and only if it was quantised: no precision is ever changed silently.

    Raises ValueError where it is not, or was quantised for images of another shape.
    """
    if not isinstance(model, Program):
        raise ValueError(
            "dtype int8 needs a network that was quantised once: lib.quantize(model, images, "
            "noise), or python -m lib quantize; this model is a float network"
        )
    if dtype not in (None, torch.int8):
        raise ValueError(
            f"dtype must be int8 for a quantised network, or be left out; got {dtype}: "
            "load the network that it was made from"
        )
    if model.shape != tuple(shape):
        raise ValueError(
            f"shape must be {model.shape}, as the network was quantised for; got {tuple(shape)}"
        )


def has_eight_bit_products(device):
    """Whether 8-bit networks can be compiled there to the processor's own 8-bit products."""
    return device.type == "cpu" and has_int8_products() and has_compiler()


@contextlib.contextmanager
def eight_bit_products():
    """Within it, a compile that leaves an 8-bit network in float arithmetic is a ValueError."""
    before = _products()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        yield
    if _products() == before:
        raise ValueError(
            f"dtype int8: torch {torch.__version__} did not compile the network to 8-bit products"
        )


def _products():
    """Convolutions and linear layers that torch has compiled to 8-bit products in this process."""
    counts = torch._dynamo.utils.counters["inductor"]
    return sum(counts[f"q{layer}_weight_prepack_matcher_count"] for layer in ("conv", "linear"))
