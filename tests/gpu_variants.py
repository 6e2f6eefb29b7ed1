"""The launches whose machine code is gated. `python -m tests.gpu_variants main sm_90` prints their counts as JSON.

It runs in a separate process, since Triton cannot compile in the interpreter of the other tests.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import reparam_kernels as rk
from reparam_kernels.gpu.philox import sqrt_rn
from tests.launches import constants_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Variant(NamedTuple):
    name: str
    elements: int
    call: Callable[[], object]


def latent(shape, dtype, kl_only=False, packed=False, last=False, prior=None, **options):
    """Make a call of one op, forward and backward."""
    leaf = partial(torch.zeros, dtype=DTYPES[dtype], requires_grad=True)
    leaves = [leaf(2 * shape[0], *shape[1:])] if packed == 0 and packed is not False else [leaf(shape), leaf(shape)]
    pair = None
    if packed is not False:
        moments = leaf(*(2 * n if i == packed else n for i, n in enumerate(shape)))
        if last:
            moments = moments.detach().to(memory_format=torch.channels_last).requires_grad_()
        z, kl = rk.DiagonalGaussian.from_moments(moments, packed).rsample_kl(seed=1)
        return torch.autograd.grad((z, kl), moments, (torch.zeros_like(z), torch.zeros_like(kl)))
    if prior == "tensors":
        leaves += [leaf(shape), leaf(shape)]
        pair = tuple(leaves[2:])
    elif prior is not None:
        pair = prior
    if kl_only:
        out = [rk.kl_divergence(*leaves[:2], prior=pair, **options)]
    else:
        options.setdefault("seed", 1)
        out = list(rk.reparameterize_kl(*leaves[:2], prior=pair, **options))
    return torch.autograd.grad(out, leaves, [torch.zeros(t.shape, dtype=t.dtype) for t in out])


def density(shape, dtype, prior=False, **options):
    """Make a call of a sample with its log-density, or with the ratio of that to a prior's, forward and backward."""
    leaf = partial(torch.zeros, shape, dtype=DTYPES[dtype], requires_grad=True)
    leaves = [leaf() for _ in range(4 if prior else 2)]
    if prior:
        out = rk.reparameterize_mc_kl(*leaves[:2], prior=tuple(leaves[2:]), seed=1, **options)
    else:
        out = rk.reparameterize_log_prob(*leaves, seed=1, **options)
    return torch.autograd.grad(out, leaves, [torch.zeros_like(t) for t in out])


def density_variant(name, dtype, **options) -> Variant:
    return Variant(f"log-density, {name} {dtype}", 4096 * 128, partial(density, (4096, 128), dtype, **options))


def mixture(dtype, of="both", items=256, components=512, cols=64, item_weights=False, **options):
    """Make a call of the mixture op, forward and backward."""
    leaf = partial(torch.zeros, dtype=DTYPES[dtype], requires_grad=True)
    leaves = [leaf(items, cols), leaf(components, cols), leaf(components, cols)]
    leaves.append(leaf(items, components) if item_weights else leaf(components))
    out = rk.mixture_log_prob(*leaves[:3], log_weights=leaves[3], of=of, **options)
    out = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(out, leaves, [torch.zeros_like(t) for t in out])


def mixture_variant(name, dtype, **options) -> Variant:
    """The elements of a mixture are the pairs of a point and a component, times the dims."""
    return Variant(f"mixture, {name} {dtype}", 256 * 512 * 64, partial(mixture, dtype, **options))


def variant(name, shape, dtype, **options) -> Variant:
    n = torch.Size(shape).numel()
    for size in options.get("sample_shape", ()):
        n *= size
    return Variant(f"{name} {dtype}", n, partial(latent, shape, dtype, **options))


def main() -> Iterator[Variant]:
    """The variants that the default suite compiles."""
    for dtype in ("float32", "bfloat16"):
        yield Variant(f"noise {dtype}", 2**20, partial(rk.randn, 2**20, seed=1, dtype=DTYPES[dtype]))
        yield variant("latent", (4096, 128), dtype)
        yield variant("latent, prior", (4096, 128), dtype, prior="tensors")
        yield variant("kl alone", (4096, 128), dtype, kl_only=True)
    yield density_variant("plain", "float32")
    yield density_variant("window", "float32", window=((8192, 256), (7, 5)))
    yield density_variant("tanh", "float32", squash="tanh")
    yield density_variant("Monte Carlo KL", "float32", prior=True)
    yield mixture_variant("both", "float32")
    yield mixture_variant("joint", "float32", of="joint")
    yield mixture_variant("dims", "float32", of="dims")
    yield variant("latent, a row a program", (512, 2048), "float32")
    yield variant("latent, D of 20", (408 * 10, 20), "float32")
    yield variant("latent, D of 4097", (16, 4097), "float32")


def every() -> Iterator[Variant]:
    yield from main()
    for dtype in DTYPES:
        for param in ("logvar", "logstd", "std", "softplus"):
            for prior in (None, "tensors"):
                yield variant(f"{param}{', prior' if prior else ''}", (1024, 256), dtype, param=param, prior=prior)
        for param in ("logstd", "std", "softplus"):
            yield density_variant(param, dtype, param=param)
            yield density_variant(f"{param}, Monte Carlo KL", dtype, param=param, prior=True, path_derivative=True)
        yield mixture_variant("weights of each point", dtype, item_weights=True, clamp=(-5.0, 5.0))
        yield mixture_variant("softplus", dtype, param="softplus", min_std=0.01)
    for dtype in ("float32", "bfloat16", "float16"):
        seeds = torch.arange(1024)
        yield variant("numbers as prior", (1024, 256), dtype, prior=(0.5, -1.0))
        for name, place in (("odd start", (3, 5)), ("start of fours", (4, 8))):
            yield variant(f"window, {name}", (1024, 256), dtype, window=((4096, 512), place))
        yield variant("window, samples", (1024, 256), dtype, window=((4095, 511), (4, 8)), sample_shape=(3,))
        yield variant("window, seeds", (1024, 255), dtype, window=((2048, 511), (9, 8)), seed=torch.arange(2048))
        yield variant("window, tile", (4, 4, 8, 32, 32), dtype, window=((4, 4, 20, 64, 64), (0, 0, 5, 16, 24)))
        yield variant("clamp", (1024, 256), dtype, clamp=(-5.0, 5.0))
        yield variant("elementwise", (1024, 256), dtype, event_ndim=0)
        yield variant("samples", (1024, 256), dtype, sample_shape=(4,))
        yield variant("seeds", (1024, 256), dtype, seed=seeds)
        yield variant("seeds, odd D", (1024, 255), dtype, seed=seeds)
        yield variant("seeds, odd D, samples", (1024, 255), dtype, seed=seeds, sample_shape=(3,))
        yield variant("packed channels", (16, 4, 32, 32), dtype, packed=1)
        yield variant("packed channels_last", (16, 16, 32, 32), dtype, packed=1, last=True)
        yield variant("packed, D of 20", (1024, 20), dtype, packed=1)
        yield variant("odd D", (4096, 5), dtype)
        yield variant("huge rows", (16, 65536), dtype)


def counts(variants: Iterator[Variant], target: str) -> list[dict]:
    from bench.compiled import census, compiling

    rows = []
    for v in variants:
        with compiling(target) as launches:
            v.call()
        for launch in launches:
            c = census(launch, v.elements)
            vector = constants_of(launch.constants).get("VEC")
            rows.append({"variant": v.name, "vector": vector, **c._asdict()})
    return rows


@triton.jit
def root_kernel(x_ptr, y_ptr, INLINE: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(y_ptr + i, sqrt_rn(tl.load(x_ptr + i), INLINE))


def formula(lines) -> str:
    """Write what SASS stores as an expression of what it loads."""
    value, stored = {}, ""
    for line in lines:
        op, *operands = re.sub(r"^@!?U?P\w+\s+", "", line).replace(".reuse", "").replace(",", " ").split()
        op = op.removesuffix(".FTZ")

        def product(a, b):
            sign = "-" * ((a.startswith("-") + b.startswith("-")) % 2)
            return sign + "*".join(sorted(value.get(r.lstrip("-"), r.lstrip("-")) for r in (a, b)))

        if op.startswith("LDG"):
            value[operands[0]] = "x"
        elif op == "MUFU.RSQ":
            value[operands[0]] = f"rsq({value[operands[1]]})"
        elif op == "FMUL":
            value[operands[0]] = f"({product(*operands[1:])})"
        elif op == "FFMA":
            value[operands[0]] = f"fma({product(*operands[1:3])}, {value.get(operands[3], operands[3])})"
        elif op.startswith("STG"):
            stored = value.get(operands[-1], operands[-1])
    return stored


def roots(target: str) -> list[str]:
    """The square root of the kernels, and that of ptxas."""
    from bench.compiled import compiling, disassembled, hot_path

    formulas = []
    for inline in (True, False):
        with compiling(target) as launches:
            root_kernel[(1,)](torch.zeros(128), torch.zeros(128), INLINE=inline, num_warps=4, enable_fp_fusion=False)
        formulas.append(formula(hot_path(disassembled(launches[0])[0])))
    return formulas


if __name__ == "__main__":
    which, target = sys.argv[1:]
    json.dump(
        roots(target) if which == "roots" else counts({"main": main, "every": every}[which](), target), sys.stdout
    )
