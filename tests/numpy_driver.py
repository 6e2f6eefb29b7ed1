"""The extension without torch: numpy arrays passed through DLPack, against the formulas in float64.

`python -m tests.numpy_driver EXTENSION CALLS SEED`, as tests/sanitize.py runs it under the sanitizers.
"""

import ctypes
import importlib.machinery
import importlib.util
import math
import sys

import numpy as np

from tests import oracle

CODES = {"float16": 2, "bfloat16": 4, "float32": 2, "float64": 2, "int64": 0}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
PARAMS = ("logvar", "logstd", "std", "softplus")
SHAPES = [(), (1,), (5,), (0, 3), (3, 7), (4, 0), (2, 3, 4), (130, 20), (3, 1029), (2, 1, 2065), (5, 1024), (40000,)]


class Description(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class NumpyTensor:
    """An array and its description."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, dtype
        size = array.itemsize
        self.shape = np.array(array.shape, dtype=np.int64)
        self.strides = np.array(array.strides, dtype=np.int64) // size
        self.description = Description(
            array.ctypes.data, 1, 0, array.ndim, CODES[dtype], 8 * size, 1, self.shape.ctypes.data,
            self.strides.ctypes.data, 0,
        )  # fmt: skip

    def values(self):
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.array.astype(np.float64)


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Description))
def borrow(tensor, out):
    out[0] = tensor.description
    return 0


class Exchange(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32 * 2), ("unused", ctypes.c_void_p * 4), ("borrow", ctypes.c_void_p)]
    _fields_ += [("stream", ctypes.c_void_p)]


def load(path):
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    spec = importlib.util.spec_from_loader("_C", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = Exchange((1, 3), (None,) * 4, ctypes.cast(borrow, ctypes.c_void_p), None)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    NumpyTensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(table), b"dlpack_exchange_api", None)
    NumpyTensor.table = table
    module.bind_tensor_type(NumpyTensor, type("Parameter", (NumpyTensor,), {}))
    return module


def stored(values, dtype):
    if dtype == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, dtype)


def any_layout(rng, values, dtype):
    """An input in one of several layouts."""
    array = np.array(stored(values, dtype))
    kind = rng.integers(5)
    if kind == 1:
        array = np.array(array, order="F")
    elif kind == 2 and array.ndim > 0:
        array = array.repeat(2, -1)[..., ::2]
    elif kind == 3:
        array = array.copy()[..., ::-1] if array.ndim > 0 else array
    elif kind == 4 and array.ndim > 0 and array.shape[0] > 0:
        array = np.broadcast_to(array[:1], array.shape)
    return NumpyTensor(array, dtype)


def unwritten(shape, dtype, part=slice(None)):
    """An output full of NaN. part: its slice of each row of an array twice as wide."""
    width = (*shape[:-1], 2 * shape[-1]) if shape and part != slice(None) else shape
    whole = np.array(stored(np.full(width, np.nan), dtype))
    return NumpyTensor(whole[..., part] if shape else whole, dtype)


def sigma_of(param, x, min_std):
    """sigma and its derivative."""
    if param == "softplus":
        return np.logaddexp(0, x) + min_std, 1 / (1 + np.exp(-x))
    rate = {"logvar": 0.5, "logstd": 1.0}.get(param)
    return (x, np.ones_like(x)) if rate is None else (np.exp(rate * x), rate * np.exp(rate * x))


def log_slope_of_tanh(u):
    return 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))


class Call:
    """A random valid call, with the results that it must give."""

    def __init__(self, rng, module):
        self.op = rng.choice(["randn", "forward", "backward"])

        def flip():
            return bool(rng.integers(2))

        dtype = str(rng.choice([*ROUNDING]))
        sums = "float64" if dtype == "float64" else "float32"
        shape = SHAPES[rng.integers(len(SHAPES))]
        samples = [(), (1,), (3,), (2, 2), (0,)][rng.integers(5)]
        seeds = rng.integers(-(2**63), 2**63 - 1, shape[0] if shape and shape[0] < 999 and flip() else 1)
        seed_tensor = NumpyTensor(seeds, "int64")
        self.threads = int(rng.integers(-1, 4))
        if self.op == "randn":
            self.tensors = [seed_tensor, unwritten(shape, dtype)]
            self.wanted = [(self.tensors[1], self.noise(seeds, (), shape), 0)]
            return
        param = str(rng.choice(PARAMS))
        min_std, clamp = 0.01 * (param == "softplus" and flip()), (0.75, 1.25) if flip() else None
        low, high = clamp or (0.0, 0.0)

        def draw(size, low=-2):
            return rng.uniform(low, 2, size)

        given, z, prior = flip(), flip(), flip()
        density = z and flip()
        kl = not z or (not density and flip())
        ratio, path = density and flip(), density and flip()
        tanh = density and not ratio and flip()
        event = int(rng.integers(len(shape) + 1))
        self.options = module.Options(
            getattr(module.Param, param), min_std, clamp is not None, low, high, event, ratio, tanh, path
        )
        rows = shape[: len(shape) - event]
        mu, x = any_layout(rng, draw(shape), dtype), any_layout(rng, draw(shape, 0.5), dtype)
        prior_dtype = sums if flip() else dtype
        mu_p = any_layout(rng, draw(shape), prior_dtype) if prior else None
        x_p = any_layout(rng, draw(shape, 0.5), prior_dtype) if prior else None
        eps = any_layout(rng, draw(samples + shape), dtype) if z and given else None
        seed = seed_tensor if z and not given else None
        dz, dkl = (
            any_layout(rng, draw(samples + shape), dtype) if z else None,
            any_layout(rng, draw(rows), sums) if kl else None,
        )
        dlog_q = any_layout(rng, draw(samples + rows), sums) if density else None

        m, raw = mu.values(), x.values()
        at = raw if clamp is None else raw.clip(*clamp)
        s, slope = sigma_of(param, at, min_std)
        m_p = mu_p.values() if prior else 0.0
        s_p, slope_p = sigma_of(param, x_p.values(), min_std) if prior else (1.0, 0.0)
        e = eps.values() if eps else self.noise(seeds, samples, shape)
        delta = (m - m_p) / s_p
        u = m + s * e
        v, squashed = (u - m_p) / s_p, np.tanh(u)
        if self.op == "forward":
            out_z, out_kl = unwritten(samples + shape, dtype) if z else None, unwritten(rows, sums) if kl else None
            each = 0.5 * (s / s_p) ** 2 + 0.5 * delta**2 - 0.5 - np.log(s / s_p)
            total = each.reshape(*rows, -1).sum(-1) if each.size else np.zeros(rows)
            out_q = unwritten(samples + rows, sums) if density else None
            terms = [-(e**2) / 2, -np.log(s), -np.log(2 * np.pi) / 2]
            terms += [v**2 / 2, np.log(s_p), np.log(2 * np.pi) / 2] if ratio else []
            terms += [-log_slope_of_tanh(u)] if tanh else []
            dims = tuple(range(-event, 0))
            log_q = sum(terms) + np.zeros(samples + shape)
            size = sum(map(abs, terms)) + np.zeros(samples + shape)
            self.tensors = [mu, x, mu_p, x_p, seed, eps, out_z, out_kl, out_q]
            self.wanted = [(out_z, squashed if tanh else u, 1), (out_kl, total, math.prod(shape[len(rows) :]))]
            self.wanted += [(out_q, log_q.sum(dims), size.sum(dims))]
        else:
            lead = tuple(range(len(samples)))
            g = dz.values() if z else np.zeros(shape)
            k = (dkl.values() if kl else np.zeros(rows)).reshape(rows + (1,) * event)
            q = (dlog_q.values() if density else np.zeros(samples + rows)).reshape(samples + rows + (1,) * event)
            size = 1 + np.abs(q * v / s_p) * (1 + np.abs(v)) / s_p + np.abs(q * e) * (1 + np.abs(e)) / s + np.abs(q) / s
            if tanh:
                g = g * np.exp(log_slope_of_tanh(u)) + 2 * q * squashed
            if ratio:
                g = g + q * v / s_p
            if path:
                g = g - q * e / s
            d_s = (g * e).sum(lead) if z else np.zeros(shape)
            g = g.sum(lead) if z else g
            if density and not path:
                d_s = d_s - (q / s).sum(lead)
            width = shape[-1] if shape else 1
            part = [slice(None), slice(width), slice(width, None), slice(None, None, 2)][rng.integers(4)]
            outs = [unwritten(shape, t, part) if flip() else None for t in (dtype, dtype)]
            outs += [
                unwritten(shape, t, part) if prior and (kl or density) and flip() else None
                for t in (prior_dtype, prior_dtype)
            ]
            inside = 1.0 if clamp is None else (raw >= clamp[0]) & (raw <= clamp[1])
            d_x = (d_s + k * (s / s_p**2 - 1 / s)) * slope * inside
            d_p = k * (1 - (s / s_p) ** 2 - delta**2) / s_p * slope_p
            d_m_p = -k * delta / s_p
            if ratio:
                d_m_p = d_m_p - (q * v / s_p).sum(lead)
                d_p = d_p + (q * (1 - v**2) / s_p * slope_p).sum(lead)
            values = [g + k * delta / s_p, d_x, d_m_p, d_p]
            self.tensors = [mu, x, mu_p, x_p, seed, eps, dz, dkl, dlog_q, *outs]
            scale = 8 * max(1, math.prod(samples))
            if density:
                scale = scale * np.broadcast_to(size, samples + shape).max(lead, initial=1)
            self.wanted = [(out, value, scale) for out, value in zip(outs, values, strict=True)]
        self.wanted = [w for w in self.wanted if w[0] is not None]

    def call(self, module):
        if self.op == "randn":
            module.randn(*self.tensors, self.threads)
        else:
            getattr(module, f"latent_{self.op}")(self.options, self.threads, *self.tensors)

    @staticmethod
    def noise(seeds, samples, shape):
        """Make eps [*samples, *shape]. Each per-item seed has its own stream, sample by sample."""
        eps = np.zeros((math.prod(samples), len(seeds), math.prod(shape) // max(len(seeds), 1)))
        for i, seed in enumerate(seeds if eps.size else ()):
            eps[:, i] = oracle.randn(int(seed) % 2**64, eps[:, i].size).reshape(eps[:, i].shape)
        return eps.reshape(samples + shape)

    def run(self, module):
        outputs = [id(out) for out, *_ in self.wanted]
        inputs = [t for t in self.tensors if t is not None and id(t) not in outputs]
        before = [t.array.tobytes() for t in inputs]
        try:
            self.call(module)
        finally:
            assert before == [t.array.tobytes() for t in inputs], "an input was written"

    def check(self, module):
        """Check that every instruction set gives the same bits, within rounding of the formulas."""
        bits = set()
        for isa in module.available_isas():
            module.set_isa(isa)
            for out, *_ in self.wanted:
                out.array[...] = stored(np.nan, out.dtype)
            self.run(module)
            bits.add(tuple(out.array.tobytes() for out, *_ in self.wanted))
            for out, *_ in self.wanted:
                whole = out.array if out.array.base is None else out.array.base
                gaps = np.isnan(NumpyTensor(whole, out.dtype).values()).sum()
                assert gaps == whole.size - out.array.size, "not every element written, or others"
        assert len(bits) == 1, "instruction sets differ"
        inner = 2.0**-53 if self.tensors[0].dtype == "float64" else 2.0**-24
        for out, want, terms in self.wanted:
            error = np.abs(out.values() - want)
            allowed = 4 * ROUNDING[out.dtype] * np.abs(want) + 64 * inner * terms
            allowed += 2.0**-25 * (out.dtype == "float16")  # subnormal
            assert (error <= allowed).all(), (
                type(self).__name__,
                self.op,
                out.dtype,
                out.array.shape,
                np.nanmax(error - allowed),
            )


class MixtureCall(Call):
    """A random valid call of the mixture op. Backward starts from what forward saved."""

    def __init__(self, rng, module):
        def flip():
            return bool(rng.integers(2))

        def draw(size, low=-2):
            return any_layout(rng, rng.uniform(low, 2, size), dtype)

        self.op = rng.choice(["forward", "backward"])
        self.threads = int(rng.integers(-1, 4))
        dtype = str(rng.choice([*ROUNDING]))
        sums = "float64" if dtype == "float64" else "float32"
        b, n, d = (int(rng.choice(sizes)) for sizes in ((0, 1, 16, 37, 130), (1, 16, 33, 150), (0, 1, 7, 20)))
        param = str(rng.choice(PARAMS))
        min_std = 0.01 * (param == "softplus" and flip())
        self.options = module.Options(getattr(module.Param, param), min_std, False, 0.0, 0.0)
        z, mu, x = draw((b, d)), draw((n, d)), draw((n, d), 0.5)
        kind = rng.choice(["none", "component", "item"])
        weights = (
            None if kind == "none" else any_layout(rng, rng.normal(size=(n,) if kind == "component" else (b, n)), sums)
        )
        joint, dims = ((True, False), (False, True), (True, True))[rng.integers(3)]

        s, slope = sigma_of(param, x.values(), min_std)
        w = np.full((1, n), -np.log(n)) if weights is None else weights.values().reshape(-1, n)
        e = (z.values()[:, None] - mu.values()) / s
        each = -(e**2) / 2 - np.log(s) - np.log(2 * np.pi) / 2
        whole = w + each.sum(-1)
        alone = w[..., None] + each
        joint_value, dims_value = np.logaddexp.reduce(whole, 1), np.logaddexp.reduce(alone, 1)
        out_joint, out_dims = (unwritten((b,), sums) if joint else None, unwritten((b, d), sums) if dims else None)
        saved = [unwritten((2, *out.shape), sums) if out else None for out in (out_joint, out_dims)]
        inputs = [z, mu, x, weights]
        size = 1 + d + np.abs(joint_value)
        if self.op == "forward":
            self.tensors = [*inputs, out_joint, out_dims, None, None]
            self.wanted = [(out_joint, joint_value, size), (out_dims, dims_value, 1 + np.abs(dims_value))]
        else:
            module.mixture_forward(self.options, 1, *inputs, out_joint, out_dims, *saved)
            g, h = any_layout(rng, rng.uniform(-2, 2, b), sums), any_layout(rng, rng.uniform(-2, 2, (b, d)), sums)
            grads = g.values()[:, None, None] * np.exp(whole - joint_value[:, None])[..., None] * joint
            grads = grads + h.values()[:, None] * np.exp(alone - dims_value[:, None]) * dims
            by_item = (g.values()[:, None] * np.exp(whole - joint_value[:, None])) * joint
            by_item = by_item + (h.values()[:, None] * np.exp(alone - dims_value[:, None]) * dims).sum(-1)
            values = [-(grads * e / s).sum(1), (grads * e / s).sum(0), (grads * (e**2 - 1)).sum(0) / s * slope]
            values.append(by_item.sum(0) if kind == "component" else by_item)
            outs = [unwritten(v.shape, t) for v, t in zip(values, (dtype, dtype, dtype, sums), strict=True)]
            outs = [out if flip() and (i < 3 or weights) else None for i, out in enumerate(outs)]
            self.tensors = [*inputs, g if joint else None, h if dims else None, *saved, *outs]
            scale = 16 * max(n, b, 1) * (1 + np.max(np.abs(each), initial=0))
            self.wanted = [(out, value, scale) for out, value in zip(outs, values, strict=True)]
        self.wanted = [want for want in self.wanted if want[0] is not None]

    def call(self, module):
        getattr(module, f"mixture_{self.op}")(self.options, self.threads, *self.tensors)


def main(path, calls, seed):
    module, rng = load(path), np.random.default_rng(seed)
    assert "torch" not in sys.modules
    for _ in range(calls):
        (MixtureCall if rng.integers(4) == 0 else Call)(rng, module).check(module)
    print(f"{calls * len(module.available_isas())} calls")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
