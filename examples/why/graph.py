"""Prints the autograd graph of a draw."""

from torch import Tensor


def graph(t: Tensor, **names: Tensor) -> str:
    """Return the nodes behind t, one per line, down to the named leaves."""
    if t.grad_fn is None:
        return "no grad_fn: nothing leads back from here"
    return "\n".join(lines(t.grad_fn, {id(leaf): name for name, leaf in names.items()}, 0))


def lines(node: object, names: dict[int, str], depth: int) -> list[str]:
    if node is None:
        return ["  " * depth + "a constant"]
    leaf = getattr(node, "variable", None)
    if leaf is not None:
        return ["  " * depth + names[id(leaf)]]
    below = [line for child, _ in node.next_functions for line in lines(child, names, depth + 1)]
    return ["  " * depth + type(node).__name__, *below]
