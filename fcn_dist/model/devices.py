"""What a GPU can do at most, by its name."""

import resource

import torch

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


def peak_flops(name: str) -> float | None:
    """Of the device that CUDA calls `name`; None of one that is not in the table."""
    if any(other in name for other in OTHERS):
        return None
    return next((peak for known, peak in PEAKS.items() if name.startswith(known)), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch has held at once on a CUDA device; on CPU, that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
