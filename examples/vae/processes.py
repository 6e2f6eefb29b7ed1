"""Data parallelism in which a run does not depend on the number of processes.

Each process takes its rows of every batch. The window of the rows in the batch gives them the noise that they have on
one process.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes(NamedTuple):
    rank: int = 0
    count: int = 1

    def rows(self, n: int) -> slice:
        """Return this process's rows of n; there may be none."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients that are averaged over the processes."""
        return nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


def join() -> tuple[Processes, torch.device]:
    """Join the processes that torchrun has started."""
    if "RANK" not in os.environ:
        raise SystemExit(
            "--distributed: must be started by torchrun; got a single process. "
            "Run torchrun --nproc-per-node 2 -m examples.vae --distributed."
        )
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size()), device
