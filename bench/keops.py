"""`python -m bench.keops` times a joint mixture beside KeOps (pip install pykeops), which makes no tensor of all pairs.

KeOps does not give the density of each dim in one call. It compiles a formula when it first meets it, in a minute.
"""

import argparse
import math

import torch
from torch import Tensor

from reparam_kernels.profiling import bench, measure, options
from reparam_kernels.profiling.case import Case
from reparam_kernels.profiling.providers import LOG_2PI, Outputs, providers

SHAPE = (128, 500, 40)  # of a VampPrior


def keops(z: Tensor, mu: Tensor, logvar: Tensor) -> Outputs:
    from pykeops.torch import LazyTensor

    points, means, scales = (LazyTensor(t) for t in (z[:, None], mu[None], torch.exp(-logvar)[None]))
    constant = LazyTensor((logvar + LOG_2PI).sum(1)[None, :, None])
    squares = ((points - means) ** 2 * scales).sum(-1)
    return ((-0.5 * (squares + constant)).logsumexp(dim=1).squeeze(1) - math.log(len(mu)),)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.keops", description=__doc__)
    options.add_device_options(parser)
    parser.add_argument("--csv", type=options.file(".csv"), metavar="FILE.csv", help="write a row for each provider")
    args = parser.parse_args()
    device = options.device(args, parser)
    options.start(parser.prog, device, args.threads)
    args.bandwidth, args.cold = measure.copy_bandwidth(str(device)), False
    case = Case("mixture_log_prob", SHAPE, device=device)
    functions = providers(case, ("ours", "ours again", "eager", "compile")) | {"keops": keops}
    rows = bench.measured("joint", case, functions, args)
    print(f"\n{bench.table(rows)}", flush=True)
    if args.csv is not None:
        bench.write(args.csv, rows, options.conditions(device, args.threads) | {"copy_gb_s": args.bandwidth / 1e9})


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m bench.keops: pykeops must be installed; got {error}. pip install pykeops"
        ) from None
