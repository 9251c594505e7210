"""How fast a network runs here at each precision, memory layout and block size: measured once, then cached."""

import copy
import itertools
import json
import pathlib
import platform
import time

import platformdirs
import torch

from lib.files import sha256, write_atomically

WORTH_BFLOAT16 = 1.25  # how much faster bfloat16 must be before it replaces float32


def calibrated(model, shape, device, fixed):
    """The fastest {"dtype", "block", "layout"} for an eager model on this device, those given in `fixed` (not None) kept.

    Takes a second or two for a ResNet-20 on a CPU, cached per architecture, shape, device and torch version. bfloat16 is chosen only where
    it is clearly faster. Only speed hangs on the choice, but for dtype, which is part of the base classifier (BaseClassifier).
    """
    path = pathlib.Path(platformdirs.user_cache_dir("randomized-smoothing")) / f"engine-{_key(model, shape, device, fixed)}.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = _measure(model, shape, device, fixed)
        write_atomically(path, json.dumps(found).encode())
    return found | {"dtype": getattr(torch, found["dtype"])}


def _key(model, shape, device, fixed):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()}{torch.backends.cpu.get_cpu_capability()}"
    parts = [str(model), shape, name, torch.__version__, torch.get_num_threads(), {k: str(v) for k, v in fixed.items()}]
    return sha256(repr(parts).encode())[:20]


def _measure(model, shape, device, fixed):
    from lib.engine import has_bfloat16

    dtypes = [torch.float32, torch.bfloat16] if has_bfloat16(device) else [torch.float32]
    options = {
        "dtype": dtypes if fixed["dtype"] is None else [fixed["dtype"]],
        "layout": ["channels_last", "contiguous"] if fixed["layout"] is None else [fixed["layout"]],
        "block": ([128, 256, 512] if device.type == "cpu" else [1024, 4096]) if fixed["block"] is None else [int(fixed["block"])],
    }
    rates = {choice: _rate(model, shape, device, *choice) for choice in itertools.product(*options.values())}
    best = max(rates, key=lambda choice: rates[choice] / (WORTH_BFLOAT16 if choice[0] == torch.bfloat16 else 1.0))
    return {"dtype": str(best[0]).removeprefix("torch."), "layout": best[1], "block": best[2]}


@torch.no_grad()
def _rate(model, shape, device, dtype, layout, block, seconds=0.1):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = copy.deepcopy(model).to(dtype).to(memory_format=memory_format)
    images = torch.rand(block, *shape, device=device).to(dtype).to(memory_format=memory_format)
    model(images)
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return block / best
