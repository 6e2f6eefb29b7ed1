from enum import Enum

from torch import Tensor

class Param(Enum):
    logvar = 0
    logstd = 1
    std = 2
    softplus = 3

class InvalidArgument(ValueError):
    """Its text is the name of the argument and no more; "isa" if the CPU lacks the instruction set."""

class Options:
    def __init__(
        self,
        param: Param,
        min_std: float,
        clamped: bool,
        low: float,
        high: float,
        event_ndim: int = 0,
        minus_log_p: bool = False,
        tanh: bool = False,
        path_derivative: bool = False,
        whole: tuple[int, ...] = (),
        start: tuple[int, ...] = (),
    ) -> None: ...

def bind_tensor_type(tensor: type, parameter: type) -> None: ...
def plain_pair_ndim(mu: object, x: object, /) -> int: ...
def latent_forward(
    options: Options,
    threads: int,
    mu: Tensor,
    x: Tensor,
    mu_p: Tensor | None,
    x_p: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    z: Tensor | None,
    kl: Tensor | None,
    log_q: Tensor | None,
    /,
) -> None: ...
def latent_backward(
    options: Options,
    threads: int,
    mu: Tensor,
    x: Tensor,
    mu_p: Tensor | None,
    x_p: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dlog_q: Tensor | None,
    dmu: Tensor | None,
    dx: Tensor | None,
    dmu_p: Tensor | None,
    dx_p: Tensor | None,
    /,
) -> None: ...
def mixture_forward(
    options: Options,
    threads: int,
    z: Tensor,
    mu: Tensor,
    x: Tensor,
    log_weights: Tensor | None,
    joint: Tensor | None,
    dims: Tensor | None,
    joint_sums: Tensor | None,
    dims_sums: Tensor | None,
    /,
) -> None: ...
def mixture_backward(
    options: Options,
    threads: int,
    z: Tensor,
    mu: Tensor,
    x: Tensor,
    log_weights: Tensor | None,
    djoint: Tensor | None,
    ddims: Tensor | None,
    joint_sums: Tensor | None,
    dims_sums: Tensor | None,
    dz: Tensor | None,
    dmu: Tensor | None,
    dx: Tensor | None,
    dlog_weights: Tensor | None,
    /,
) -> None: ...
def randn(
    seed: Tensor, out: Tensor, threads: int, whole: tuple[int, ...] = (), start: tuple[int, ...] = ()
) -> None: ...
def test_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def test_box_muller(radius: bytes, angle: bytes) -> bytes: ...
def test_eps(seed: int, first: int, n: int) -> bytes: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(isa: str) -> None: ...
def has_openmp() -> bool: ...
