"""The record of the mixture op."""

from ...core.op import Op
from .arguments import Arguments, shapes
from .formula import formula

MIXTURE = Op(
    "mixture",
    Arguments,
    inputs=("z", "mu", "x", "log_weights"),
    outputs=("joint", "dims"),
    saved=("joint_sums", "dims_sums"),
    formula=formula,
    shapes=shapes,
    package=__package__,
    expands=("log_weights",),
)
