"""The extension driven from numpy, without torch: `python -m tests.numpy_driver PATH_OF_THE_MODULE CALLS SEED`.

Loads where torch cannot be, under a sanitizer or valgrind; every result is held against the formula in float64.
"""

import ctypes
import importlib.machinery
import importlib.util
import math
import sys

import numpy as np

from tests import oracle

CODES = {"i": 0, "f": 2}
SHAPES = [(), (1,), (7,), (3, 5), (64, 20), (2, 3, 5), (1, 4, 1, 6), (5, 1030), (2, 4097), (0,), (4, 0), (300, 129)]


class Tensor(ctypes.Structure):
    """DLTensor, as csrc/dlpack.h has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
def borrow(lent, out):
    a = lent.array
    numbers = ctypes.c_int64 * a.ndim
    lent.kept = numbers(*a.shape), numbers(*(stride // a.itemsize for stride in a.strides))
    shape, strides = (ctypes.cast(part, ctypes.POINTER(ctypes.c_int64)) for part in lent.kept)
    device = (ctypes.c_int32 * 2)(1, 0)
    out[0] = Tensor(a.ctypes.data, device, a.ndim, CODES[a.dtype.kind], 8 * a.itemsize, 1, shape, strides, 0)
    return 0


TABLE = (ctypes.c_void_p * 7)(1 | 3 << 32, None, None, None, None, ctypes.cast(borrow, ctypes.c_void_p), None)
NAME = b"dlpack_exchange_api"
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Lent:
    __dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(TABLE), NAME, None)

    def __init__(self, array):
        self.array = array


class Parameter(Lent):
    pass


def lend(array):
    return None if array is None else Lent(array)


def spread(param, min_std, x):
    """sigma and its slope."""
    if param == "softplus":
        return np.logaddexp(0, x) + min_std, 1 / (1 + np.exp(-x))
    if param == "std":
        return x, np.ones_like(x)
    scale = 0.5 if param == "logvar" else 1.0
    return np.exp(scale * x), scale * np.exp(scale * x)


class Driver:
    def __init__(self, module, seed):
        self.module, self.random = module, np.random.default_rng(seed)

    def pick(self, *values):
        return values[self.random.integers(len(values))]

    def values(self, shape, dtype, low=-2.0, high=2.0):
        """Numbers in an array that lies anyhow: with gaps, transposed, backwards, in one place."""
        kind = self.pick("plain", "gaps", "turned", "back", "one place")
        made = self.random.uniform(low, high, shape).astype(dtype)
        if kind == "one place":
            return np.broadcast_to(made.reshape(-1)[:1].reshape(()), shape) if made.size else made
        if kind == "gaps" and shape:
            held = np.full((*shape[:-1], 3 * shape[-1] + 1), np.nan, dtype)
            held[..., 1::3] = made
            return held[..., 1::3]
        if kind == "back" and shape:
            return made[::-1]
        return made.copy("F") if kind == "turned" else made

    def call(self):
        shape, dtype = SHAPES[self.random.integers(len(SHAPES))], self.pick("float16", "float32", "float64")
        wide = "float64" if dtype == "float64" else "float32"
        param, threads = self.pick("logvar", "logstd", "std", "softplus"), int(self.pick(1, 2, 3))
        min_std = self.pick(0.0, 1e-3) if param == "softplus" else 0.0
        clamp = self.pick(None, (0.6, 1.1))
        options = self.module.Options(getattr(self.module.Param, param), min_std, clamp is not None, *(clamp or (0, 0)))
        low = 0.5 if param == "std" else -2.0
        mu, x = self.values(shape, dtype), self.values(shape, dtype, low)
        prior_dtype = self.pick(dtype, wide)
        prior = (
            [self.values(shape, prior_dtype), self.values(shape, prior_dtype, low)] if self.pick(0, 1) else [None] * 2
        )
        samples = self.pick((), (2,), (2, 0), (3, 1))
        keep = int(self.random.integers(len(shape) + 1))
        events, size = tuple(range(keep, len(shape))), math.prod(shape)
        per_item = bool(shape and shape[0] and self.pick(0, 1))
        seed = self.random.integers(-(2**63), 2**63, shape[0] if per_item else 1)

        each = size // seed.size if size else 0
        streams = [[oracle.randn(int(one) % 2**64, each, i * each) for one in seed] for i in range(math.prod(samples))]
        noise = np.array(streams, "float32").reshape(samples + shape)
        given = self.values(samples + shape, dtype) if self.pick(0, 1) else None
        eps = (noise if given is None else given).astype("float64")
        source = (Lent(seed), None) if given is None else (None, Lent(given))

        m, raw = mu.astype("float64"), x.astype("float64")
        at = raw if clamp is None else np.clip(raw, *clamp)
        inside = 1.0 if clamp is None else (raw >= clamp[0]) & (raw <= clamp[1])
        s, ds = spread(param, min_std, at)
        ds = ds * inside
        mp, sp, dsp = 0.0, 1.0, 0.0
        if prior[0] is not None:
            mp = prior[0].astype("float64")
            sp, dsp = spread(param, min_std, prior[1].astype("float64"))
        gap = m - mp
        kl = (np.log(sp / s) + (s**2 + gap**2) / (2 * sp**2) - 0.5).sum(axis=events)

        z_out, kl_out = np.full(samples + shape, np.nan, dtype), np.full(shape[:keep], np.nan, wide)
        inputs = (Lent(mu), Lent(x), *map(lend, prior), *source)
        self.module.forward(options, *inputs, Lent(z_out), Lent(kl_out), threads)
        rough = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-12}
        self.close(z_out, m + s * eps, rough[dtype])
        self.close(kl_out, kl, 20 * rough[wide] * math.prod(shape[keep:]))

        dz, dkl = self.values(samples + shape, dtype), self.values(shape[:keep], wide)
        outs = [np.full(shape, np.nan, dtype) for _ in range(2)] + [
            np.full(shape, np.nan, prior_dtype) if p is not None else None for p in prior
        ]
        self.module.backward(options, *inputs, Parameter(dz), Lent(dkl), *map(lend, outs), threads)
        over = tuple(range(len(samples)))
        g = dz.astype("float64")
        up = dkl.astype("float64").reshape(shape[:keep] + (1,) * len(events))
        want = [g.sum(axis=over) + up * gap / sp**2, ((g * eps).sum(axis=over) + up * (s / sp**2 - 1 / s)) * ds]
        want += [-up * gap / sp**2, up * (1 / sp - (s**2 + gap**2) / sp**3) * dsp]
        for out, expected in zip(outs, want, strict=True):
            if out is not None:
                self.close(out, np.broadcast_to(expected, shape), 100 * rough[out.dtype.name])

        out = np.full(shape, np.nan, dtype)
        self.module.randn(Lent(seed), Parameter(out), threads)
        if noise.size:
            self.close(out, noise.reshape(-1, *shape)[0], rough[dtype])

    def close(self, got, want, tolerance):
        np.testing.assert_allclose(got.astype("float64"), want, tolerance, tolerance * 10)


def main(path, calls, seed):
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    spec = importlib.util.spec_from_loader("_C", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.bind_tensor_type(Lent, Parameter)
    for isa in module.available():
        module.use(isa)
        driver = Driver(module, seed)
        for _ in range(calls):
            driver.call()
        print(f"{isa}: {3 * calls} calls")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
