"""The machine: its devices, cores, precisions and compiler."""

import contextlib
import ctypes
import os
import shutil

import torch


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16 natively.

    That is CUDA from compute capability 8.0, and x86 with avx512_bf16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def has_int8_products():
    """Whether the CPU multiplies 8-bit integers natively (x86 with avx512_vnni, avx_vnni or AMX).

    Without them sums of two products saturate at 16 bits, and an 8-bit network votes differently.
    """
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def processor(device):
    """The type of machine, as far as votes hang on it: alike machines have the same.

    A GPU's name; of a CPU the vector instructions that torch uses, and those of short numbers.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "amx_int8", "avx512_vnni", "avx_vnni")
    kind = torch.backends.cpu.get_cpu_capability()
    return " ".join([kind, *(name for name in names if found.get(name))])


def pick_device(device=None):
    """The torch.device asked for, if it is here; default: a GPU if there is one, else the CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that is here, such as cpu, cuda or cuda:1; got {str(device)!r}"
        ) from error
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


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


@contextlib.contextmanager
def full_float32(device, dtype):
    """Within it, float32 on a GPU is float32, and not TensorFloat-32 with its 10-bit mantissa."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def keep_freed_memory():
    """Tell glibc to keep the activations that are freed after each block or step.

    They are wanted again at once, and a page fault costs more.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: blocks of any size come from the heap, which keeps them
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is not given back before the end
