"""What devices can do at most, and how memory is held on them."""

import ctypes
import resource
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# How torch and the libraries below it say that memory ran out; on CPU they have no exception of their own for it.
SHORTAGE = (
    *("out of memory", "ALLOC_FAILED"),  # CUDA and its libraries
    *("DefaultCPUAllocator", "bad_alloc"),
    *("could not create a", "could not execute a primitive"),  # oneDNN
)
# Floating-point operations a second in 16 bits with float32 sums, without sparsity: NVIDIA's data sheets.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4": 312e12,
    "NVIDIA A100-PCIE": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "Tesla V100-SXM": 125e12,
}
OTHERS = ("NVL", "MIG")  # of the same names, but with less
# What torch calls a CPU's instructions for products of a type.
CPU_CAPABILITIES = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def peak_flops(name: str) -> float | None:
    """Of the device that CUDA calls `name`; None of one that is not in the table."""
    if any(other in name for other in OTHERS):
        return None
    return next((peak for known, peak in PEAKS.items() if name.startswith(known)), None)


def uses_kernels(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute with tensors like this one, rather than torch."""
    return tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` has instructions for products of `dtype`; elsewhere they take longer than those of float32."""
    if dtype not in CPU_CAPABILITIES:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in CPU_CAPABILITIES[dtype])


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch has held at once on a CUDA device; on CPU, that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step rather than give them back and fault them in again.

    On one thread of a shared machine, forward and backward of the full VGG16 (2 images, 192x192, median of 3) took
    4.3 s, 0.45 of them in the kernel; so they take 3.6 s, and none.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, (1 << 31) - 1)  # the largest int: DeepSpeed's buckets have 2 GB
        libc.mallopt(m_trim_threshold, -1)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in SHORTAGE)
