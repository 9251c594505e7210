"""A network made ready to vote: one precision, one memory layout, one block shape."""

import copy
import logging
import time

import torch
from torch import nn

from lib.checks import check_choice, check_draws
from lib.engine.admission import (
    copy_with_shared_weights,
    count_classes,
    logits_of,
    runs_in_bfloat16,
)
from lib.engine.folding import folded
from lib.engine.hardware import cores, has_bfloat16, has_compiler, keep_freed_memory, pick_device
from lib.engine.tuning import calibrated

COMPILE_PAYS = 30.0  # seconds of eager forward passes from which a compile (5 - 30 s) pays
log = logging.getLogger(__name__)


def default_dtype(model, device):
    """bfloat16 where the hardware has it and the network is large enough (100,000 parameters) to gain from it; else float32."""
    large = sum(p.numel() for p in model.parameters()) >= 100_000
    return torch.bfloat16 if large and has_bfloat16(device) else torch.float32


class _Voter(nn.Module):
    """Logits to votes: the class of each row, or `classes` (one past the last) where a logit is not finite."""

    def __init__(self, model, classes):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x):
        logits = logits_of(self.model, x)
        return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), self.classes)


class BaseClassifier:
    """A network made ready to vote: copied, in eval mode, at one precision, one memory layout and one block shape.

    The base classifier f that is smoothed and certified IS this network as it runs: batch norms folded into the weights where they can be, bfloat16
    rounding included; dtype=torch.float32 keeps single precision. On a CPU each forward pass runs on one core, and as many of them side by side as
    torch has threads: faster than one pass on all cores, and a vote does not depend on how many there are. Share one BaseClassifier among
    all ModelCounts of a model, so that it is compiled once.

    model  : nn.Module, logits [B, C] from float images [B, *shape] in [0, 1], normalisation inside; each image by itself. Not changed.
             (All its floating-point numbers are cast to dtype. A random forward is admitted, with a warning: its average is certified.)
    shape  : (channels, height, width) of an image.
    device : default CUDA where there is one, else CPU.
    dtype  : torch.float32 or torch.bfloat16; default by rule (`default_dtype`, and where the network runs in it), never by timing: it is
             part of what is certified.
    block, layout : images a forward pass, always full; "channels_last" or "contiguous". What is None is found by a short calibration,
             cached in the user's cache folder; calibrate=False takes channels_last and 128 (CPU) or 4,096 (GPU) instead.
    compile: True, False, or "auto": eager until a draw is asked that is worth the compile, and where that is no faster.
    `settings` says what was chosen. Votes of different settings may differ at rounding ties: fix them to compare counts bit by bit.
    Raises ValueError naming the argument.
    """

    def __init__(
        self,
        model,
        shape,
        device=None,
        dtype=None,
        block=None,
        layout=None,
        compile="auto",
        calibrate=True,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must be a torch.nn.Module that maps images to logits; got {type(model).__name__}"
            )
        check_choice((True, False, "auto"), compile=compile)
        check_choice((None, torch.float32, torch.bfloat16), dtype=dtype)
        check_choice((None, "channels_last", "contiguous"), layout=layout)
        if block is not None:
            check_draws(block=block)
        self.device = pick_device(device)
        self.shape = tuple(shape)
        model = copy.deepcopy(model).eval().float()
        self.dtype = dtype or default_dtype(model, self.device)
        self.classes = count_classes(model.to(self.device), self.shape, self.device)
        short = folded(
            model.cpu(), self.shape
        )  # on the CPU, so that the same network is folded everywhere
        self.folded, model = short is not model, short.to(self.device)
        if self.dtype == torch.bfloat16 and (
            why := runs_in_bfloat16(model, self.shape, self.device)
        ):
            if dtype:
                raise ValueError(
                    f"dtype: model does not run in bfloat16 ({why}): make constants of its forward buffers, or pass dtype=torch.float32"
                )
            log.warning("model does not run in bfloat16, counting in float32 (%s)", why)
            self.dtype = torch.float32
        if self.device.type == "cpu":
            keep_freed_memory()
        if None in (block, layout):
            fixed = {"block": 128 if self.device.type == "cpu" else 4096, "layout": "channels_last"}
            given = {"block": block, "layout": layout}
            with cores(1):
                found = (
                    calibrated(model, self.shape, self.device, self.dtype, given)
                    if calibrate
                    else fixed
                )
            block, layout = block or found["block"], layout or found["layout"]
        self.block, self.layout = int(block), layout
        self.memory_format = (
            torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        )
        self._voter = _Voter(
            model.to(self.dtype).to(memory_format=self.memory_format), self.classes
        )
        self._copies = [self._voter]
        self.compiled, self._auto = False, compile == "auto"
        if compile is True:
            self.compile()

    @property
    def settings(self):
        """What runs: device, dtype, block, layout, folded, compiled, torch (flat, for records and logs)."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "block": self.block,
            "layout": self.layout,
            "folded": self.folded,
            "compiled": self.compiled,
            "torch": torch.__version__,
        }

    def compile(self):
        """Compile with frozen weights (batch norm and normalisation folded). Without a C++ compiler on a CPU, says so and stays eager."""
        self._auto = False
        if self.device.type == "cpu" and not has_compiler():
            log.warning(
                "no C++ compiler (g++) found: counting eagerly, which is slower; install one, or pass compile=False"
            )
            return
        options, eager = {"cpp.threads": 1}, self._voter
        if self.device.type == "cuda":
            options |= {"max_autotune": True, "triton.cudagraphs": True}
        self._voter = torch.compile(self._voter, dynamic=False, options=options)
        # Each network compiled in this process counts against one limit, past which torch would silently run it eagerly. Freezing is asked
        # for here, since among the options it has no effect.
        limits = torch._dynamo.config.patch(
            recompile_limit=10_000, accumulated_recompile_limit=10_000
        )
        try:
            with cores(1), limits, torch._inductor.config.patch(freezing=True):
                self.votes(self.empty_block())
        except BaseException:
            self._voter = eager
            raise
        self.compiled = True

    @property
    def workers(self):
        """Forward passes side by side: on a CPU as many as torch has threads (torch.set_num_threads, OMP_NUM_THREADS)."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def consider_compiling(self, draws):
        """With compile="auto": compile if so many draws would take longer than a compile pays for, and if it makes this network faster."""
        if not self._auto or draws < 20 * self.block:
            return
        eager, before = self._voter, self._seconds()
        if before * draws / self.block / self.workers > COMPILE_PAYS:
            self.compile()
            if self.compiled and self._seconds() > before:
                self._voter, self.compiled = eager, False

    def _seconds(self):
        """Time of one block on one core, or on the GPU: the best of three."""
        block, times = self.empty_block(), []
        for _ in range(4):
            start = time.perf_counter()
            with cores(1):
                self.votes(block)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def empty_block(self):
        """A block of zeros, [block, *shape], in the dtype, layout and device of the network."""
        return torch.zeros(self.block, *self.shape, dtype=self.dtype, device=self.device).to(
            memory_format=self.memory_format
        )

    def voters(self, workers):
        """A voter for each worker, of the same weights: two passes at once must not meet in what a forward stores on its modules."""
        while not self.compiled and len(self._copies) < workers:
            self._copies.append(copy_with_shared_weights(self._voter))
        return [self._voter] * workers if self.compiled else self._copies[:workers]

    @torch.no_grad()
    def votes(self, images, voter=None):
        """Class of each row of a full block, int64 [block]; `classes` where a logit is not finite. voter: one of `voters`."""
        return (self._voter if voter is None else voter)(images)
