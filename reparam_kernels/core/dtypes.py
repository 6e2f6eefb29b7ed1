"""The dtypes that the ops take, and those that they compute in."""

import torch

from . import torch_modes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of sums: float64 for float64, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch_modes.constant_to_the_compiler
def has_float64(device: torch.device) -> bool:
    """Return True if the device computes in float64. Some GPUs of Intel and all of Apple do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"
