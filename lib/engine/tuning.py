"""How fast a network runs here at each memory layout and block size: measured once, then cached."""

import contextlib
import copy
import itertools
import json
import math
import pathlib
import platform
import time

import platformdirs
import torch

from lib.store.files import sha256, write_atomically

GPU_BLOCK = 1 << 26  # numbers in the images of a block on a GPU: 4,096 of CIFAR-10, 445 of ImageNet


def tuned(model, shape, device, dtype, given):
    """The fastest {"block", "layout"} of a network that runs eagerly on this device.

    It takes about a second for a ResNet-20 on one core and is then cached per architecture, shape,
    device, dtype and torch version. It affects speed only.

    - model: nn.Module.
    - shape: (channels, height, width) of an image.
    - device, dtype: where and in which precision it will run.
    - given: {"block", "layout"}; values that are not None are kept.
    """
    path = (
        pathlib.Path(platformdirs.user_cache_dir("randomized-smoothing"))
        / f"engine-{_key(model, shape, device, dtype, given)}.json"
    )
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        found = _measure(model, shape, device, dtype, given)
        with contextlib.suppress(OSError):  # a read-only home costs a second each time, no more
            write_atomically(path, json.dumps(found).encode())
        return found


def _key(model, shape, device, dtype, given):
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor()}{torch.backends.cpu.get_cpu_capability()}"
    )
    parts = [str(model), shape, name, str(dtype), torch.__version__, given]
    return sha256(repr(parts).encode())[:20]


def _measure(model, shape, device, dtype, given):
    # On a CPU each core has a block of its own: it should stay in the core's cache, and there
    # must not be many large images.
    sizes = (
        [b for b in (16, 32, 64, 128, 256, 512) if b == 16 or b * math.prod(shape) <= 1 << 20]
        if device.type == "cpu"
        else [b for b in (16, 64, 256, 1024, 4096) if b == 16 or b * math.prod(shape) <= GPU_BLOCK]
    )
    blocks = [int(given["block"])] if given["block"] else sizes
    layouts = [given["layout"]] if given["layout"] else ["channels_last", "contiguous"]
    rates = {}
    for choice in itertools.product(blocks, layouts):
        try:
            rates[choice] = _rate(model, shape, device, dtype, *choice)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break  # the larger blocks will not fit either
    block, layout = max(rates, key=rates.get)
    return {"block": block, "layout": layout}


@torch.no_grad()
def _rate(model, shape, device, dtype, block, layout, seconds=0.1):
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
