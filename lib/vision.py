"""The one place that imports torchvision, inside functions only, as that takes seconds.

`from lib.vision import torchvision`. When torchvision is first imported it registers kernels for
two operators of its compiled part. Beside a build of torch that this part was not made for (a CPU
build with the PyPI wheel of torchvision) the operators do not exist and the import fails, although
models, transforms and data sets need neither. They are declared here where they are missing, and
only there.
"""

import importlib
import importlib.util
import pathlib

import torch

_compiled = list(pathlib.Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C.*"))
try:
    torch.ops.load_library(str(_compiled[0]))
except (IndexError, OSError):
    torch.library.define(
        "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    torch.library.define(
        "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

torchvision = importlib.import_module("torchvision")
