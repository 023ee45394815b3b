"""The backend for a tensor, and the device properties that kernel launchers need."""

import importlib.util
import math
import warnings

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "alignment",
    "architecture_of",
    "choose_backend",
    "gpu_refusal",
    "num_processors",
    "operand",
    "precision_of",
]

BACKENDS = ("auto", "torch", "triton")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)


def choose_backend(tensor: Tensor, backend: str = "auto") -> str:
    """The backend, "torch" or "triton", for operations on a tensor of this device and dtype.

    "auto" chooses Triton on NVIDIA GPUs from sm_80 for float32, bfloat16 and float16, and plain
    PyTorch otherwise; on any other GPU it warns with the reason.

    Args:
        tensor: Its device and dtype decide.
        backend: "auto", or the name of the backend to force.

    Raises:
        ValueError: ``backend`` is unknown, or is "triton" although Triton cannot run.

    >>> choose_backend(torch.zeros(1))
    'torch'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}; choose one")
    if backend == "torch" or (backend == "auto" and not _is_gpu(tensor)):
        return "torch"
    reason = _triton_refusal(tensor)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(
            f"backend must be 'torch' here, got 'triton', because {reason}; leave it at 'auto'"
        )
    warnings.warn(f"plain PyTorch serves this GPU, because {reason}", stacklevel=3)
    return "torch"


def _triton_refusal(tensor: Tensor) -> str | None:
    """Why Triton cannot run on the tensor; None if it can."""
    if tensor.is_floating_point() and tensor.dtype not in _TRITON_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if _is_gpu(tensor):
        return gpu_refusal(torch.version.hip, _capability(tensor.device))
    if tensor.device.type != "cpu":
        return f"the kernels are built for NVIDIA GPUs, not for {tensor.device.type}"
    if _interprets():
        return None
    return "Triton runs on a CPU in its interpreter only; set TRITON_INTERPRET=1 to test"


def gpu_refusal(hip: str | None, capability: tuple[int, int]) -> str | None:
    """The reason why the Triton kernels cannot run on a GPU, or None if they can.

    Args:
        hip: Version of ROCm; None on NVIDIA.
        capability: Compute capability, (9, 0) for sm_90.
    """
    if hip is not None:
        return "the kernels are built and tested for NVIDIA GPUs, not for ROCm"
    if capability < _MIN_CAPABILITY:
        return "the kernels need sm_80 or newer and this GPU is sm_{}{}".format(*capability)
    return None


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def alignment(width: int) -> int:
    """Largest power of two up to 16 that divides D, and so the offset of every row.

    >>> [alignment(width) for width in (64, 100, 7)]
    [16, 4, 1]
    """
    return math.gcd(width, 16)


def architecture_of(device: torch.device) -> int:
    """The architecture by which tiles are looked up: 80, 86, 90 or 100; 0 for the interpreter.

    Newer consumer GPUs count as 86, as they have the same shared memory, 99 KiB per program.
    """
    if device.type == "cpu":
        return 0
    major, minor = _capability(device)
    if major in (9, 10, 11):
        return min(major, 10) * 10
    return 80 if (major, minor) == (8, 0) else 86


def num_processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 4 in the interpreter."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand(matrix: Tensor) -> Tensor:
    """The matrix as a kernel reads it: contiguous.

    In the interpreter bfloat16 becomes float32, because its bfloat16 matrix product is wrong.
    """
    if matrix.device.type == "cpu" and matrix.dtype is torch.bfloat16:
        return matrix.float()
    return matrix.contiguous()


def precision_of(dtype: torch.dtype) -> str:
    """Precision of matrix products in Triton: "ieee", or "tf32" if PyTorch's settings allow it."""
    # ``torch.get_float32_matmul_precision`` raises an error after this attribute was set, which the
    # older settings change too.
    allowed = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if dtype is torch.float32 and allowed == "tf32" else "ieee"
