"""Checkpoints: ours (safetensors with a JSON header) written and read, and the published ones of the field read."""

import io
import json
import logging
import re
import warnings

import safetensors.torch
import torch
from torch import nn

from lib.data import INFO
from lib.files import read_bytes, sha256, write_atomically
from lib.models import ARCHITECTURES, Normalize, build

# How Sequential(NormalizeLayer, network) and DataParallel, in either order or alone, begin the names of the network's weights.
PREFIXES = ("module.1.module.", "module.1.", "1.module.", "1.", "module.", "")
CONSTANTS = {"means": "mean", "mean": "mean", "sds": "std", "std": "std"}
log = logging.getLogger(__name__)


def model_hash(model):
    """Hex SHA-256 of a model's weights and buffers, names, dtypes and values: what a record was made with."""
    parts = []
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        parts += [f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return sha256(*parts)


def save_checkpoint(path, model, header, half=True):
    """Write a model: safetensors weights (half precision unless half=False) and a header.

    header: dict with "architecture" and "data" (see lib.models.build) and provenance (loss, sigma, seed, epochs, accuracy, ...).
    Raises ValueError where the file could not be read back: a model of other weights than header says, or weights beyond half precision.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with torch.device("meta"):
        _check_fit(build(header["architecture"], header["data"]), state, "model")
    if half:
        if large := [k for k, v in state.items() if v.is_floating_point() and v.isfinite().all() and not v.half().isfinite().all()]:
            raise ValueError(f"model has weights that half precision cannot hold, in {', '.join(large)}: pass half=False")
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    write_atomically(path, safetensors.torch.save(state, metadata={"header": json.dumps(header, sort_keys=True)}))


def load_checkpoint(path, architecture=None, data=None):
    """Read a model from a file: (module in float32 and eval mode, logits from images in [0, 1]; header dict). No code in the file is run.

    The file is one of
    - ours (save_checkpoint), which says all about itself;
    - a dict with `arch` and `state_dict` (Cohen et al. 2019 and the repositories that follow it), its names beginning with 1., 1.module.,
      module.1. or nothing. The first layer normalises, by the file's `means` and `sds` where it holds them, else by the data set's constants;
    - a dict with `net` (Zhai et al. 2020), which takes images in [0, 1] as they are;
    - a plain state dict (torchvision's), in front of which the data set's normalisation is set.
    architecture, data: needed where the file does not say (lib.models.ARCHITECTURES, lib.data.INFO); data is taken to be cifar10 for
    cifar_resnet*, imagenet for resnet*. header: "architecture", "data", "format" and what else the file says.
    Raises FileNotFoundError, or ValueError on a damaged file, an unknown architecture, and missing, unexpected or misshapen weights, listed.
    """
    content = read_bytes(path, "name a checkpoint, or train one (make models; python -m lib train)")
    if content[8:9] != b"{" and content[:1] in (b"P", b"\x80"):  # zip or pickle; safetensors begins with 8 bytes of length and a JSON dict
        return _published(path, content, architecture, data)
    try:
        state = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = dict(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint (safetensors of save_checkpoint, or a file of torch.save): {error!r}") from error
    for name, given in (("architecture", architecture), ("data", data)):
        if name not in header:
            raise ValueError(f"{path}: its header lacks {name!r}; it holds {', '.join(header) or 'nothing'}")
        if given not in (None, header[name]):
            raise ValueError(f"{name} must be {header[name]!r}, as {path} says, or be left out; got {given!r}")
    model = build(header["architecture"], header["data"])
    _fill(model, state, path)
    return model.eval(), {"format": "ours"} | header


def _published(path, content, architecture, data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles that it then refuses
            file = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" ({asked[1]})" if asked else ""
        raise ValueError(f"{path} is damaged, or holds more than tensors and numbers{reason}, which could run any code and is not read") from error
    kind, state = _state(path, file)
    architecture = architecture or (file.get("arch") if kind == "state_dict" else None)
    if architecture not in ARCHITECTURES:
        says = f"names the architecture {architecture!r}" if architecture else "does not say its architecture"
        raise ValueError(f"{path} {says}: give it, one of {', '.join(ARCHITECTURES)} (README: a network of your own)")
    data = data or ("cifar10" if architecture.startswith("cifar") else "imagenet" if architecture.startswith("resnet") else None)
    if data not in INFO:
        raise ValueError(f"{path} does not say its data set: give data, one of {', '.join(INFO)}; got {data!r}")
    constants, state = _split(state)
    model = build(architecture, data)
    _fill(model[1], state, path)
    if kind == "plain" and not constants:
        log.info("%s holds no normalisation layer: as for torchvision's weights, one with the mean and deviation of %s is put in front", path, data)
    if kind == "net" and not constants:
        model[0] = nn.Identity()
    elif constants:
        default = INFO[data]
        model[0] = Normalize(constants.get("mean", default.mean), constants.get("std", default.std))
    header = {k: v for k, v in file.items() if isinstance(v, str | int | float) and k != "arch"} if kind != "plain" else {}
    return model.eval(), header | {"architecture": architecture, "data": data, "format": kind}


def _state(path, file):
    """("state_dict", "net" or "plain"; the weights of a file)."""
    for kind in ("state_dict", "net"):
        if isinstance(file, dict) and isinstance(file.get(kind), dict):
            return kind, file[kind]
    if isinstance(file, dict) and file and all(isinstance(v, torch.Tensor) for v in file.values()):
        return "plain", file
    found = ", ".join(map(str, file)) if isinstance(file, dict) else type(file).__name__
    raise ValueError(f"{path} is no checkpoint: expected a dict with state_dict and arch, with net, or of tensors; it holds {found or 'nothing'}")


def _split(state):
    """(constants of a normalisation layer {"mean", "std"} as lists, weights without the prefix of their names)."""
    constants, weights = {}, {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(module\.)?0\.(means|sds|mean|std)", name)
        if found:
            constants[CONSTANTS[found[2]]] = tensor.flatten().tolist()
        else:
            weights[name] = tensor
    prefix = next(p for p in PREFIXES if all(name.startswith(p) for name in weights))
    return constants, {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _fill(model, state, path):
    """Load weights into a model in float32, where they fit."""
    _check_fit(model, state, path)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)


def _check_fit(model, state, source):
    """A ValueError that lists what of the weights is missing, unexpected or of another shape."""
    own = model.state_dict()
    # Files from before torch 0.4.1 lack this counter, which the network does not use.
    faults = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in own],
        "other shapes": [f"{k} {list(state[k].shape)}, not {list(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape],
    }
    if any(faults.values()):
        listed = [f"{what}: {', '.join(k[:10])}{f' and {len(k) - 10} more' if k[10:] else ''}" for what, k in faults.items() if k]
        raise ValueError(f"{source} does not fit its architecture. {'; '.join(listed)}")
