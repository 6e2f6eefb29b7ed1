"""Checks for the user's own model: are its gradients right, and does it train as before?"""

from .gradcheck import gradcheck
from .same_training import assert_same_training

__all__ = ["assert_same_training", "gradcheck"]
