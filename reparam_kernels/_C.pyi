from enum import Enum

from torch import Tensor

class Param(Enum):
    logvar = 0
    logstd = 1
    std = 2
    softplus = 3

class Options:
    def __init__(self, param: Param, min_std: float, clamped: bool, low: float, high: float) -> None: ...

def bind_tensor_type(tensor: type, parameter: type) -> None: ...
def forward(
    options: Options,
    mu: Tensor,
    x: Tensor,
    mu_p: Tensor | None,
    x_p: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    z: Tensor | None,
    kl: Tensor | None,
    threads: int,
) -> None: ...
def backward(
    options: Options,
    mu: Tensor,
    x: Tensor,
    mu_p: Tensor | None,
    x_p: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dx: Tensor | None,
    dmu_p: Tensor | None,
    dx_p: Tensor | None,
    threads: int,
) -> None: ...
def randn(seed: Tensor, out: Tensor, threads: int) -> None: ...
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def box_muller(radius: bytes, angle: bytes) -> bytes: ...
def noise(seed: int, first: int, n: int) -> bytes: ...
def available() -> list[str]: ...
def use(isa: str) -> None: ...
def isa() -> str: ...
def has_openmp() -> bool: ...
