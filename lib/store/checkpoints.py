"""Checkpoint files: ours (safetensors with a JSON header), and those that others publish.

Files hold weights and facts; the network that they fit is built by lib.models.
"""

import dataclasses
import io
import json
import re
import warnings

import safetensors.torch
import torch

from lib.store.files import read_bytes, sha256, write_atomically

# How Sequential(NormalizeLayer, network) and DataParallel, in either order or alone, begin the
# names of the network's weights.
PREFIXES = ("module.1.module.", "module.1.", "1.module.", "1.", "module.", "")
CONSTANTS = {"means": "mean", "mean": "mean", "sds": "std", "std": "std"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    - format: "ours", "state_dict" (a dict with `arch`), "net" or "plain" (a bare state dict).
    - state: the weights, {name: tensor}, prefixes of wrappers removed.
    - header: what the file says of itself (architecture, data, loss, sigma, ...).
    - constants: {"mean", "std"} of a published normalisation layer, where the file has one.
    """

    format: str
    state: dict
    header: dict
    constants: dict


def state_hash(state):
    """Hex SHA-256 of a state dict: names, dtypes, shapes and values."""
    parts = []
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        parts.append(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256(*parts)


def write_checkpoint(path, state, header, half=True):
    """Write weights and a header as safetensors, whole or not at all.

    - half: round floating-point weights to half precision (they are read back as float32).

    Raises ValueError where a weight lies beyond half precision.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    if half:
        wide = [k for k, v in state.items() if v.is_floating_point() and _overflows(v)]
        if wide:
            raise ValueError(
                f"model has weights that half precision cannot hold, in {', '.join(wide)}: "
                "pass half=False"
            )
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    metadata = {"header": json.dumps(header, sort_keys=True)}
    write_atomically(path, safetensors.torch.save(state, metadata=metadata))


def _overflows(tensor):
    return bool(tensor.isfinite().all() and not tensor.half().isfinite().all())


def read_checkpoint(path):
    """Read a checkpoint file of any known format as a Checkpoint. No code in the file is run.

    Raises FileNotFoundError, or ValueError on a damaged file or one of another kind.
    """
    content = read_bytes(path, "name a checkpoint, or train one (make models; python -m lib train)")
    # Zip or pickle; safetensors begins with 8 bytes of length and a JSON dict.
    if content[8:9] != b"{" and content[:1] in (b"P", b"\x80"):
        return _published(path, content)
    try:
        state = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = dict(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint (safetensors of save_checkpoint, or a file of "
            f"torch.save): {error!r}"
        ) from error
    return Checkpoint("ours", state, header, {})


def _published(path, content):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles that it then refuses
            file = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" ({asked[1]})" if asked else ""
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and numbers{reason}, which could run "
            "any code and is not read"
        ) from error
    kind, state = _weights(path, file)
    constants, state = _split(state)
    header = {}
    if kind != "plain":
        header = {k: v for k, v in file.items() if isinstance(v, str | int | float)}
    return Checkpoint(kind, state, header, constants)


def _weights(path, file):
    """("state_dict", "net" or "plain"; the weights of a file)."""
    for kind in ("state_dict", "net"):
        if isinstance(file, dict) and isinstance(file.get(kind), dict):
            return kind, file[kind]
    tensors = isinstance(file, dict) and all(isinstance(v, torch.Tensor) for v in file.values())
    if tensors and file:
        return "plain", file
    held = ", ".join(map(str, file)) if isinstance(file, dict) else type(file).__name__
    raise ValueError(
        f"{path} is no checkpoint: expected a dict with state_dict and arch, with net, or of "
        f"tensors; it holds {held or 'nothing'}"
    )


def _split(state):
    """(constants of a normalisation layer as lists, weights without the prefix of their names)."""
    constants, weights = {}, {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(module\.)?0\.(means|sds|mean|std)", name)
        if match:
            constants[CONSTANTS[match[2]]] = tensor.flatten().tolist()
        else:
            weights[name] = tensor
    prefix = next(p for p in PREFIXES if all(name.startswith(p) for name in weights))
    return constants, {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
