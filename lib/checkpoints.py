"""Checkpoints: ours (safetensors with a JSON header) written and read."""

import json

import safetensors.torch
import torch

from lib.files import read_bytes, sha256, write_atomically
from lib.models import build


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
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    write_atomically(path, safetensors.torch.save(state, metadata={"header": json.dumps(header, sort_keys=True)}))


def load_checkpoint(path):
    """Read a model of `save_checkpoint`: (module in float32 and eval mode, header dict). Raises ValueError on a damaged or unknown file."""
    data = read_bytes(path, "name a checkpoint, or train one (make models)")
    try:
        state = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["header"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of save_checkpoint: {error}") from error
    model = build(header["architecture"], header["data"])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval(), header
