"""A network made ready to vote: one precision, one memory layout, one block shape."""

import contextlib
import copy
import logging
import math
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
from lib.engine.hardware import (
    cores,
    full_float32,
    has_bfloat16,
    has_compiler,
    keep_freed_memory,
    pick_device,
    processor,
)
from lib.engine.int8 import check_int8, eight_bit_products, has_eight_bit_products
from lib.engine.integers import in_float32
from lib.engine.tuning import GPU_BLOCK, tuned
from lib.store.programs import Program

COMPILE_PAYS = 30.0  # seconds of eager forward passes from which a compile (5 - 30 s) pays
LARGEST = 1 << 20  # pixels in a block of an 8-bit network, which should stay in the core's cache
DTYPES = ("float32", "bfloat16", "int8")
log = logging.getLogger(__name__)


def default_dtype(model, device):
    """bfloat16 where the hardware has it and the network is large enough to gain; else float32.

    Large enough means 100,000 parameters.
    """
    large = sum(p.numel() for p in model.parameters()) >= 100_000
    return torch.bfloat16 if large and has_bfloat16(device) else torch.float32


def _as_dtype(dtype):
    """The torch.dtype of a name or of itself; None is left to the rule."""
    check_choice((None, *DTYPES), dtype=str(dtype).removeprefix("torch.") if dtype else None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


class _Voter(nn.Module):
    """Logits to votes: each row's class, or `classes` (one past the last) if one is not finite."""

    def __init__(self, model, classes):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x):
        logits = logits_of(self.model, x)
        return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), self.classes)


class _Scorer(nn.Module):
    """The logits themselves in float32, for readouts of several networks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return logits_of(self.model, x).float()


class _Ballot:
    """The votes of each block by one network."""

    def __init__(self, base, voter):
        self.base, self.voter = base, voter

    def __call__(self, block, place):
        return [(place, self.base.forward(block, self.voter)[None])]

    def rest(self):
        return []


class BaseClassifier:
    """A network made ready to vote: copied, in eval mode, with one precision, layout and block.

    The base classifier f that is smoothed and certified IS this network as it runs: batch norms
    folded into the weights where they can be, bfloat16 rounding or 8-bit integers included (an
    8-bit network is certified itself, and not the one that it was made from). On a CPU each forward
    pass runs on one core, and as many run side by side as torch has threads: this is faster than
    one pass on all cores, and a vote does not depend on their number. Share one BaseClassifier
    among all ModelCounts of a model, so that it is compiled once.

    - model: nn.Module, logits [B, C] from float images [B, *shape] in [0, 1], normalisation
      inside, each image by itself. It is copied; all its floating-point numbers are cast to dtype.
      A random forward is admitted with a warning, and its average is certified, where it draws for
      each image by itself; weights drawn once a pass are refused.
    - shape: (channels, height, width) of an image.
    - device: default CUDA where there is one, else the CPU.
    - dtype: "float32", "bfloat16" or "int8", or the torch.dtype. The default follows a rule
      (`default_dtype`, and float32 if the network does not run in bfloat16), never a timing: it is
      part of what is certified. A network of `lib.quantize` is int8 and nothing else: compiled
      for a CPU with 8-bit dot products, and elsewhere the same integers in float32
      (lib.engine.integers). Its default device is the CPU.
    - block: images per forward pass; every pass is full.
    - layout: "channels_last" or "contiguous".
    - compile: True, False, or "auto": compiled if a job is long enough to repay it, and only if
      that makes this network faster. Decided once per job, at its first draw.
    - tune: whether block and layout, where they are None, are chosen by a short measurement, which
      is cached in the user's cache folder. False takes channels_last and 128 (CPU) or 4,096 (GPU).
    - votes: False makes a member of several networks, whose logits are read in float32.

    `settings` says what was chosen. Votes of different settings may differ at rounding ties: fix
    the settings to compare counts bit by bit. Raises ValueError naming the argument.
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
        tune=True,
        votes=True,
    ):
        if not isinstance(model, nn.Module):
            remedy = (
                f"load it: lib.zoo.model({model!r}), of a file lib.models.load_checkpoint(path)[0]"
                if isinstance(model, str)
                else "wrap it in a module whose forward returns logits [B, classes]"
            )
            raise ValueError(
                "model must be a torch.nn.Module that maps images to logits; "
                f"got {type(model).__name__}: {remedy}"
            )
        check_choice((True, False, "auto"), compile=compile)
        dtype = _as_dtype(dtype)
        check_choice((None, "channels_last", "contiguous"), layout=layout)
        if block is not None:
            check_draws(block=block)
        if isinstance(model, Program) or dtype == torch.int8:
            check_int8(model, shape, dtype)
            device, dtype, compile, tune = device or "cpu", torch.int8, compile is not False, False
        self.device = pick_device(device)
        self.shape = tuple(shape)
        model = copy.deepcopy(model).eval().float()
        self.dtype = dtype or default_dtype(model, self.device)
        self.classes = count_classes(model.to(self.device), self.shape, self.device)
        # On the CPU, so that the same network is folded everywhere.
        short = folded(model.cpu(), self.shape)
        self.folded, model = short is not model, short.to(self.device)
        self._eight_bit = compile and has_eight_bit_products(self.device)
        if self.dtype == torch.int8 and not self._eight_bit:
            model = in_float32(model)
        self._check_bfloat16(model, asked=dtype is not None)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.block, self.layout = self._shape_of_blocks(model, block, layout, tune)
        self.memory_format = (
            torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        )
        model = model.requires_grad_(False).to(self.input_dtype)
        model = model.to(memory_format=self.memory_format)
        self._use(_Voter(model, self.classes) if votes else _Scorer(model))
        self._scoring = None if votes else self
        self.compiled, self._auto = False, compile == "auto"
        if compile is True:
            self.compile()

    def _check_bfloat16(self, model, asked):
        """Fall back to float32 where the network does not run in bfloat16 and none was asked."""
        if self.dtype != torch.bfloat16:
            return
        why = runs_in_bfloat16(model, self.shape, self.device)
        if why and asked:
            raise ValueError(
                f"dtype: model does not run in bfloat16 ({why}): "
                "make constants of its forward buffers, or pass dtype=torch.float32"
            )
        if why:
            log.warning("model does not run in bfloat16, counting in float32 (%s)", why)
            self.dtype = torch.float32

    def _shape_of_blocks(self, model, block, layout, tune):
        """(block, layout): those given, measured, or fixed."""
        if block is not None and layout is not None:
            return int(block), layout
        gpu = max(16, min(4096, GPU_BLOCK // math.prod(self.shape)))
        chosen = {"block": 128 if self.device.type == "cpu" else gpu, "layout": "channels_last"}
        if self.dtype == torch.int8:  # votes are the same at every block
            chosen["block"] = max(16, min(256, LARGEST // math.prod(self.shape)))
        if tune:
            with cores(1):
                given = {"block": block, "layout": layout}
                chosen = tuned(model, self.shape, self.device, self.dtype, given)
        return int(block or chosen["block"]), layout or chosen["layout"]

    def _use(self, voter):
        self._voter, self._copies = voter, [voter]

    @property
    def input_dtype(self):
        """The dtype of images and floating-point weights: an 8-bit network rounds by itself."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    @property
    def network(self):
        """The network that votes, in its precision and layout, not compiled: logits of a batch."""
        return self._copies[0].model

    @property
    def settings(self):
        """What runs, as a flat dict for records and logs.

        Its keys are device, processor (its type), dtype, block, layout, folded, compiled and torch.
        """
        return {
            "device": self.device.type,
            "processor": processor(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "block": self.block,
            "layout": self.layout,
            "folded": self.folded,
            "compiled": self.compiled,
            "torch": torch.__version__,
        }

    def compile(self):
        """Compile with frozen weights (batch norm and normalisation folded).

        Without a C++ compiler on a CPU it says so and stays eager.
        """
        self._auto = False
        if self.device.type == "cpu" and not has_compiler():
            log.warning(
                "no C++ compiler (g++) found: counting eagerly, which is slower; "
                "install one, or pass compile=False"
            )
            return
        options, eager = {"cpp.threads": 1}, self._voter
        if self.device.type == "cuda":
            options |= {"max_autotune": True, "triton.cudagraphs": True}
        self._voter = torch.compile(self._voter, dynamic=False, options=options)
        # Each network compiled in this process counts against one limit, past which torch would
        # silently run it eagerly. Freezing is asked for here: among the options it has no effect.
        limits = torch._dynamo.config.patch(
            recompile_limit=10_000, accumulated_recompile_limit=10_000
        )
        whole = self.dtype == torch.int8 and self._eight_bit
        watched = eight_bit_products() if whole else contextlib.nullcontext()
        try:
            with cores(1), limits, torch._inductor.config.patch(freezing=True), watched:
                self.forward(self.empty_block())
        except BaseException:
            self._voter = eager
            raise
        self.compiled = True

    @property
    def workers(self):
        """Forward passes side by side: on a CPU as many as torch has threads.

        Set it with torch.set_num_threads or OMP_NUM_THREADS.
        """
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def consider_compiling(self, draws):
        """Whether a job of so many draws runs compiled; compile="auto" is decided here.

        It compiles if the draws would take longer than a compile pays for, and keeps the result
        if that is faster. A job asks once, so that it never mixes two networks.
        """
        if self._auto and draws >= 20 * self.block:
            eager, before = self._voter, self._seconds()
            if before * draws / self.block / self.workers > COMPILE_PAYS:
                self.compile()
                if self.compiled and self._seconds() > before:
                    self._voter, self.compiled = eager, False
        return self.compiled

    def _seconds(self):
        """Time of one block on one core, or on the GPU: the best of three."""
        block, times = self.empty_block(), []
        for _ in range(4):
            start = time.perf_counter()
            with cores(1):
                self.forward(block)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def empty_block(self):
        """A block of zeros [block, *shape], in the dtype, layout and device of the network."""
        return torch.zeros(self.block, *self.shape, dtype=self.input_dtype, device=self.device).to(
            memory_format=self.memory_format
        )

    def voters(self, workers, compiled):
        """A voter for each worker, of the same weights.

        Two passes at once must not meet in what a forward stores on its modules.
        """
        if compiled:
            return [self._voter] * workers
        while len(self._copies) < workers:
            self._copies.append(copy_with_shared_weights(self._copies[0]))
        return self._copies[:workers]

    def ballots(self, workers, compiled):
        """A ballot for each worker: calls of (block, place), then `rest`, give (place, votes)."""
        return [_Ballot(self, voter) for voter in self.voters(workers, compiled)]

    def scoring(self):
        """The same network as a member of several: `forward` gives its logits in float32.

        It shares the weights, is compiled where this one is, and is made once.
        """
        if self._scoring is None:
            member = copy.copy(self)
            member._use(_Scorer(self._copies[0].model))
            member._scoring, member.compiled = member, False
            if self.compiled:
                member.compile()
            self._scoring = member
        return self._scoring

    @torch.no_grad()
    def forward(self, images, voter=None):
        """Votes of a full block, int64 [block]; of `scoring` its logits, float32 [block, classes].

        - images: [block, *shape], as `empty_block`.
        - voter: one of `voters`.

        A row where a logit is not finite votes for `classes`, one past the last class.
        """
        with full_float32(self.device, self.input_dtype):
            return (self._voter if voter is None else voter)(images)
