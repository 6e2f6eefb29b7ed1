"""The record of the latent op."""

import math

from ...core.formats import format_of
from ...core.op import Op
from ..noise.op import noise_op
from .arguments import Arguments, unpacked
from .formula import formula, gradient_formula
from .outputs import shapes
from .sharded import shard


def with_noise(arguments: Arguments) -> Arguments:
    """Return the arguments with eps, made from the seed, in place of the seed."""
    if arguments.seed is None:
        return arguments
    samples = arguments.config.sample_shape
    eps = noise_op(
        arguments.seed, (*samples, *unpacked(arguments)[0].shape), math.prod(samples), arguments.config.window
    )
    return arguments._replace(seed=None, eps=eps)


def kept(arguments: Arguments) -> Arguments:
    """Return the arguments that backward reads. The gradients of z, and of log q along with it, do not depend on mu.

    x then stands for mu, whose gradient is to have the format of mu.
    """
    mu, x, config = arguments.mu, arguments.x, arguments.config
    if x is None or config.kl or config.tanh or config.minus_log_p or config.path_derivative:
        return arguments
    return Arguments(x, *arguments[1:]) if format_of(mu) is format_of(x) else arguments


LATENT = Op(
    "latent",
    Arguments,
    inputs=("mu", "x", "mu_p", "x_p"),
    outputs=("z", "kl", "log_q"),
    formula=formula,
    shapes=shapes,
    package=__package__,
    gradient_formula=gradient_formula,
    expands=("mu_p", "x_p"),
    keeps_format=True,
    kept=kept,
    with_noise=with_noise,
    shard=shard,
)
