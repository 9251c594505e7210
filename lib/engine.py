"""Live votes: a network under noise, counted at the speed of the hardware (the third source of counts)."""

import contextlib
import copy
import ctypes
import logging
import math
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lib.calibration import calibrated
from lib.checks import check_choice, check_draws, check_images, check_labels, check_seed
from lib.counts import check_request
from lib.models import folded
from lib.probe import copy_with_shared_weights, count_classes, logits_of, runs_in_bfloat16

CHUNK = 100  # draws that share one random stream: part of the definition of the noise, so never a setting
PIECE = 1 << 16  # pixels of noise to draw at a time where a chunk has fewer: small pieces cost more in calls than in numbers
COMPILE_PAYS = 30.0  # seconds of eager forward passes from which a compile (5 - 30 s) is worth waiting for
log = logging.getLogger(__name__)


def noise_stream(seed, index, chunk, device):
    """The generator of the draws CHUNK * chunk, ... of one example: a function of its arguments alone.

    On the CPU numpy's SFC64, seeded with all bits: torch's CPU generator keeps 32 bits of its seed, so that among a million streams
    about a hundred pairs would be the same noise. On a GPU torch's Philox with a 63-bit seed.
    """
    state = np.random.SeedSequence([seed, index, chunk])
    if device.type == "cpu":
        return np.random.Generator(np.random.SFC64(state))
    return torch.Generator(device).manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16 natively (CUDA from compute capability 8.0, x86 with avx512_bf16)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_device(device=None):
    """The torch.device asked for, if it is here; by default a GPU where there is one, else the CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that is here, such as cpu, cuda or cuda:1; got {str(device)!r}") from error
    return torch.device(device)


def default_dtype(model, device):
    """bfloat16 where the hardware has it and the network is large enough (100,000 parameters) to gain from it; else float32."""
    large = sum(p.numel() for p in model.parameters()) >= 100_000
    return torch.bfloat16 if large and has_bfloat16(device) else torch.float32


def has_compiler():
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@contextlib.contextmanager
def cores(number):
    """Within it, torch computes on so many cores in this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory():
    """Tell glibc not to hand freed activations back to the system after each block: they are wanted again at once, and a page fault costs more."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the largest that every version admits
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


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

    def __init__(self, model, shape, device=None, dtype=None, block=None, layout=None, compile="auto", calibrate=True):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module that maps images to logits; got {type(model).__name__}")
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
        short = folded(model.cpu(), self.shape)  # on the CPU, so that the same network is folded everywhere
        self.folded, model = short is not model, short.to(self.device)
        if self.dtype == torch.bfloat16 and (why := runs_in_bfloat16(model, self.shape, self.device)):
            if dtype:
                raise ValueError(f"dtype: model does not run in bfloat16 ({why}): make constants of its forward buffers, or pass dtype=torch.float32")
            log.warning("model does not run in bfloat16, counting in float32 (%s)", why)
            self.dtype = torch.float32
        if self.device.type == "cpu":
            keep_freed_memory()
        if None in (block, layout):
            fixed = {"block": 128 if self.device.type == "cpu" else 4096, "layout": "channels_last"}
            given = {"block": block, "layout": layout}
            with cores(1):
                found = calibrated(model, self.shape, self.device, self.dtype, given) if calibrate else fixed
            block, layout = block or found["block"], layout or found["layout"]
        self.block, self.layout = int(block), layout
        self.memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        self._voter = _Voter(model.to(self.dtype).to(memory_format=self.memory_format), self.classes)
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
            log.warning("no C++ compiler (g++) found: counting eagerly, which is slower; install one, or pass compile=False")
            return
        options, eager = {"cpp.threads": 1}, self._voter
        if self.device.type == "cuda":
            options |= {"max_autotune": True, "triton.cudagraphs": True}
        self._voter = torch.compile(self._voter, dynamic=False, options=options)
        # Each network compiled in this process counts against one limit, past which torch would silently run it eagerly. Freezing is asked
        # for here, since among the options it has no effect.
        limits = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
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
        return torch.zeros(self.block, *self.shape, dtype=self.dtype, device=self.device).to(memory_format=self.memory_format)

    def voters(self, workers):
        """A voter for each worker, of the same weights: two passes at once must not meet in what a forward stores on its modules."""
        while not self.compiled and len(self._copies) < workers:
            self._copies.append(copy_with_shared_weights(self._voter))
        return [self._voter] * workers if self.compiled else self._copies[:workers]

    @torch.no_grad()
    def votes(self, images, voter=None):
        """Class of each row of a full block, int64 [block]; `classes` where a logit is not finite. voter: one of `voters`."""
        return (self._voter if voter is None else voter)(images)


class ModelCounts:
    """Live Monte Carlo: votes of a base classifier under noise, for B examples at once.

    The draws of all examples fill blocks of one fixed shape, so that a draw of 100 for each of 500 examples is full device batches. Noise is
    drawn and added in float32. Draw j of an example depends on (seed, its index, j) alone: counts are the same for any batch, order of
    examples, number of cores or processes, at one block size and engine setting on one machine type.

    model : nn.Module (see BaseClassifier, whose further arguments may be given by keyword) or a BaseClassifier.
    x     : float32 images [B, channels, height, width] in [0, 1]. noise: smoothing distribution; sigma a scalar or one value per example.
    index : int [B], each example's index in its data set, which seeds its noise; default 0..B-1. seed: whole number >= 0.
    bounded: False admits finite pixels outside [0, 1], in the same units: a perturbed image may leave the range, a certificate covers it too.
    progress: True, False, or None: a bar on draws of more than a few seconds.
    `votes` holds the counts of all draws so far, int64 [B, C]; the next draw goes on behind them.
    Raises ValueError naming the argument; also where the model gives non-finite logits, which are never counted as a class.
    """

    def __init__(self, model, x, noise, index=None, seed=0, progress=None, bounded=True, **engine):
        check_images(x, bounded=bounded)
        if isinstance(model, BaseClassifier):
            if engine:
                raise ValueError(f"{', '.join(engine)}: set when the BaseClassifier was made, not here")
            if model.shape != tuple(x.shape[1:]):
                raise ValueError(f"x must hold images of shape {model.shape}, as the BaseClassifier was made for; got {tuple(x.shape[1:])}")
        self.base = model if isinstance(model, BaseClassifier) else BaseClassifier(model, x.shape[1:], **engine)
        self.x, self.noise, self.seed, self.progress = x.detach(), noise, seed, progress
        self.index = np.arange(len(x)) if index is None else check_labels(index, len(x), "index")
        check_seed(seed)
        if np.ndim(getattr(noise, "sigma", 0)) == 1 and len(noise.sigma) != len(x):
            raise ValueError(f"noise: sigma must be one value, or {len(x)}, one per example of x; got {len(noise.sigma)}")
        self.classes = self.base.classes
        self.votes = np.zeros((len(x), self.classes), dtype=np.int64)

    def __len__(self):
        return len(self.x)

    def draw(self, n):
        """Class counts int64 [B, C] of the next n draws of each example (n: one number, or int [B])."""
        n = check_request(n, len(self))
        total = int(n.sum())
        self.base.consider_compiling(total)
        with tqdm(total=total, unit=" draws", unit_scale=True, delay=3, disable=False if self.progress is None else not self.progress) as bar:
            counts = self._share(self._pieces(n, bar), -(-total // self.base.block))
        if counts[:, -1].any():
            i = int(np.argmax(counts[:, -1]))
            raise ValueError(
                f"model gave non-finite logits (NaN or infinity) on {counts[i, -1]} of {n[i]} noisy copies of example {self.index[i]}: "
                "check its weights and normalisation, or try dtype=torch.float32"
            )
        self.votes += counts[:, :-1]
        return counts[:, :-1].copy()

    def _pieces(self, n, bar):
        """What is to be drawn, in pieces of one chunk, or some of small images: (example, chunks, first and last + 1 of their draws)."""
        some = max(1, PIECE // (CHUNK * math.prod(self.base.shape)))
        drawn = self.votes.sum(axis=1)
        for i in np.flatnonzero(n):
            start, end = int(drawn[i]), int(drawn[i] + n[i])
            for chunk in range(start // CHUNK, -(-end // CHUNK), some):
                chunks = range(chunk, min(chunk + some, -(-end // CHUNK)))
                first, last = max(start - chunk * CHUNK, 0), min(end - chunk * CHUNK, CHUNK * len(chunks))
                bar.update(last - first)
                yield int(i), chunks, first, last

    def _share(self, pieces, blocks):
        """Counts int64 [B, C + 1] of all pieces, which the workers take one by one; never more workers than blocks."""
        if self.base.device.type != "cpu":
            with cores(1):  # as it was compiled: torch compiles anew for another number of threads
                return self._count(pieces, self.base.voters(1)[0])
        lock, over, workers = threading.Lock(), threading.Event(), max(1, min(self.base.workers, blocks))

        def take():
            with lock:
                return None if over.is_set() else next(pieces, None)

        # The limit of threads is each thread's own, but for MKL's, which is restored here.
        with cores(1), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                tasks = [pool.submit(self._count, iter(take, None), voter) for voter in self.base.voters(workers)]
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                over.set()  # where one fails, or the user interrupts, the others take no more
            return sum(task.result() for task in tasks)

    def _count(self, pieces, voter):
        """Votes int64 [B, C + 1] of pieces, the last column for logits that are not finite, in full blocks of which the last is padded."""
        base = self.base
        block, owner, filled = base.empty_block(), np.full(base.block, len(self)), 0
        counts = torch.zeros((len(self) + 1) * (self.classes + 1), dtype=torch.int64, device=base.device)

        def vote():
            votes = base.votes(block, voter)
            cell = torch.from_numpy(owner).to(votes.device) * (self.classes + 1) + votes
            counts.index_add_(0, cell, torch.ones_like(cell))

        for i, chunks, first, last in pieces:
            noisy = self._noisy(i, chunks)[first:last]
            while len(noisy):
                rows = min(len(noisy), base.block - filled)
                block[filled : filled + rows] = noisy[:rows]
                owner[filled : filled + rows] = i
                filled, noisy = filled + rows, noisy[rows:]
                if filled == base.block:
                    vote()
                    filled = 0
        if filled:
            owner[filled:] = len(self)  # the padding votes for nobody
            vote()
        return counts.view(len(self) + 1, self.classes + 1)[:-1].cpu().numpy()

    def _noisy(self, i, chunks):
        """The noisy copies of example i that make up some chunks, CHUNK of each, float32 on the device."""
        streams = [noise_stream(self.seed, int(self.index[i]), chunk, self.base.device) for chunk in chunks]
        size = CHUNK * len(streams)
        return self.noise.select(np.full(size, i)).sample(self.x[i].to(self.base.device).expand(size, *self.base.shape), streams)
