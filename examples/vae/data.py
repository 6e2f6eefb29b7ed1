"""Images as rows of numbers in [0, 1]: scikit-learn's handwritten digits, or the user's .npz file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Images(NamedTuple):
    train: Tensor  # (N, H * W), float32
    test: Tensor
    train_label: Tensor | None
    test_label: Tensor | None
    height: int
    width: int


def load(path: Path | None = None) -> Images:
    """Load images, with a fixed fifth held out. A file holds `x` (N, H, W) and maybe `y`, or a single array."""
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = digits.images / 16.0, digits.target
    else:
        x, y = read(path)
    order = np.random.default_rng(0).permutation(len(x))
    held_out = max(len(x) // 5, 1)
    rows = torch.tensor(x.reshape(len(x), -1)[order], dtype=torch.float32)
    labels = (None, None) if y is None else torch.tensor(np.asarray(y)[order]).tensor_split((held_out,))
    return Images(rows[held_out:], rows[:held_out], labels[1], labels[0], x.shape[1], x.shape[2])


def read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(path, allow_pickle=False) as file:
        names = list(file)
        name = "x" if "x" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"{path}: must hold one array, or images named x; got {names}. Save it with x=images.")
        x, y = file[name], file["y"] if "y" in names else None
    if x.ndim != 3 or len(x) < 2:
        raise ValueError(f"{path}: {name} must be (N, H, W) with N > 1; got {x.shape}. Drop the channel dim.")
    x = x.astype(np.float64)
    if not np.isfinite(x).all() or x.min() < 0 or x.max() <= 0:
        raise ValueError(f"{path}: pixels must be finite, not negative, not all 0. Shift them first.")
    return x / x.max(), y
