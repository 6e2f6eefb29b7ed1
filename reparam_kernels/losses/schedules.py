"""Numbers that rise in the course of a training: the weight of the KL, and its capacity."""

import math


def linear_beta(step: int, steps: int, beta: float = 1.0) -> float:
    """Return the KL's weight, which rises from 0 at step 0 to `beta` at `steps` and stays there.

        weight = beta min(1, step / steps)

    Args:
        step: steps done.
        steps: length of the warm-up; 0: the weight is beta from step 0 on.
        beta: the final weight.

    Returns:
        The weight, a float.

    Raises:
        ValueError: steps is negative.

    Source:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating Sentences from a Continuous Space", 2016; the
        weight beta is Higgins et al., "beta-VAE", 2017.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.linear_beta(step, 4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    check_not_negative("linear_beta", "steps", steps)
    return beta * risen(step, steps)


def cyclical_beta(step: int, steps: int, cycles: int = 4, ratio: float = 0.5, beta: float = 1.0) -> float:
    """Return the KL's weight, which rises from 0 to `beta` in the first `ratio` of each cycle, then stays level.

        weight = beta min(1, tau / ratio),  tau = (step mod (steps / cycles)) / (steps / cycles)

    Args:
        step: steps done.
        steps: length of the training; after it the weight is beta.
        cycles: the number of equal cycles, positive.
        ratio: the part of a cycle in which the weight rises, in [0, 1]; 0: the weight is always beta.
        beta: the highest weight.

    Returns:
        The weight, a float.

    Raises:
        ValueError: if steps or ratio is negative, or cycles is not positive.

    Source:
        Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL
        Vanishing", 2019.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.cyclical_beta(step, 8, cycles=2) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    check_not_negative("cyclical_beta", "steps", steps)
    check_not_negative("cyclical_beta", "ratio", ratio)
    if not cycles > 0:
        raise ValueError(f"cyclical_beta: cycles must be positive; got {cycles}. Pass 1 for a single rise.")
    if step >= steps:
        return beta
    return beta * risen(math.fmod(step * cycles, steps) / steps, ratio)


def capacity(step: int, steps: int, final: float) -> float:
    """Return the capacity C for capacity_loss, which rises from 0 at step 0 to `final` at `steps` and stays there.

        C = final min(1, step / steps)

    Args:
        step: steps done.
        steps: length of the rise; 0: C is final from step 0 on.
        final: the capacity at the end of the rise, in nats.

    Returns:
        C, a float.

    Raises:
        ValueError: steps is negative.

    Source:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.capacity(step, 100, 25.0) for step in (0, 50, 200)]
        [0.0, 12.5, 25.0]
    """
    check_not_negative("capacity", "steps", steps)
    return final * risen(step, steps)


def risen(done: float, length: float) -> float:
    """Return the part of a rise that is done, at most 1. A rise of length 0 is over."""
    return min(1.0, done / length) if length > 0 else 1.0


def check_not_negative(where: str, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{where}: {name} must not be negative; got {value}. Pass 0 for no rise.")
