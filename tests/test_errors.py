"""Every error, word for word: `where: what must hold; got what. Do this.`"""

import math

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import _C

pytestmark = pytest.mark.usefixtures("says_where")

MU, X = torch.zeros(64, 32), torch.zeros(64, 32)
ASK_SEED = "Pass an int in [0, 2**63), or an int64 tensor on mu's device."

CASES = {
    "shape": (
        lambda: rk.reparameterize(MU, X[:, :16]),
        ValueError,
        "reparameterize: logvar must have the shape of mu; got mu (64, 32), logvar (64, 16). "
        "Check the encoder's last layer, or expand logvar before the call.",
    ),
    "dtype": (
        lambda: rk.reparameterize_kl(MU.int(), X.int()),
        TypeError,
        "reparameterize_kl: mu must be float16, bfloat16, float32 or float64; got int32. "
        "Convert it, for example with mu.float().",
    ),
    "mixed dtypes": (
        lambda: rk.kl_divergence(MU, X.half()),
        TypeError,
        "kl_divergence: logvar must have the dtype of mu; got mu float32, logvar float16. "
        "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
    ),
    "device": (
        lambda: rk.reparameterize(MU, X.to("meta")),
        ValueError,
        "reparameterize: logvar must be on the device of mu; got mu cpu, logvar meta. Move one of them with .to().",
    ),
    "a number for a tensor": (
        lambda: rk.reparameterize(0.0, X),
        TypeError,
        "reparameterize: mu must be a torch.Tensor; got float. Wrap it with torch.as_tensor.",
    ),
    "a number for logvar": (
        lambda: rk.kl_divergence(MU, 0),
        TypeError,
        "kl_divergence: logvar must be a torch.Tensor; got int. Wrap it with torch.as_tensor.",
    ),
    "sparse": (
        lambda: rk.reparameterize(MU.to_sparse(), X),
        TypeError,
        "reparameterize: mu must be a dense (strided) tensor; got torch.sparse_coo. Convert it with mu.to_dense().",
    ),
    "two sources": (
        lambda: rk.reparameterize(MU, X, seed=1, generator=torch.Generator()),
        ValueError,
        "reparameterize: at most one of seed, generator and eps may be given; got seed and generator. "
        "Keep the one that should decide the noise.",
    ),
    "three sources": (
        lambda: rk.reparameterize_kl(MU, X, seed=1, generator=torch.Generator(), eps=MU),
        ValueError,
        "reparameterize_kl: at most one of seed, generator and eps may be given; got seed and generator and eps. "
        "Keep the one that should decide the noise.",
    ),
    "generator": (
        lambda: rk.reparameterize(MU, X, generator=3),
        TypeError,
        "reparameterize: generator must be a torch.Generator; got int. "
        "Make one with torch.Generator(device).manual_seed(0), or pass seed=.",
    ),
    "negative seed": (
        lambda: rk.reparameterize(MU, X, seed=-1),
        ValueError,
        "reparameterize: seed must lie in [0, 2**63); got -1. Reduce it, for example modulo 2**63.",
    ),
    "large seed": (
        lambda: rk.randn(3, seed=2**63),
        ValueError,
        "randn: seed must lie in [0, 2**63); got 9223372036854775808. Reduce it, for example modulo 2**63.",
    ),
    "float seed": (
        lambda: rk.reparameterize(MU, X, seed=1.0),
        TypeError,
        f"reparameterize: seed must be an int; got float. {ASK_SEED}",
    ),
    "bool seed": (
        lambda: rk.reparameterize(MU, X, seed=True),
        TypeError,
        f"reparameterize: seed must be an int; got bool. {ASK_SEED}",
    ),
    "seed dtype": (
        lambda: rk.reparameterize(MU, X, seed=torch.zeros(1)),
        TypeError,
        "reparameterize: a seed tensor must be int64; got float32. Convert it with .to(torch.int64).",
    ),
    "seed count": (
        lambda: rk.reparameterize(MU, X, seed=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "reparameterize: a seed tensor must have one element, or shape (64,), one for each leading item; "
        "got shape (3,). Give one seed for the call, or one for each item of the leading dim.",
    ),
    "seed device": (
        lambda: rk.reparameterize(MU, X, seed=torch.zeros(1, dtype=torch.int64, device="meta")),
        ValueError,
        "reparameterize: a seed tensor must be on the device of the call; got meta, not cpu. Move it with .to().",
    ),
    "eps shape": (
        lambda: rk.reparameterize(MU, X, eps=MU, sample_shape=(2,)),
        ValueError,
        "reparameterize: eps must have the shape of z, (2, 64, 32); got (64, 32). "
        "It is sample_shape, then the shape of mu.",
    ),
    "eps dtype": (
        lambda: rk.reparameterize(MU, X, eps=MU.double()),
        TypeError,
        "reparameterize: eps must have the dtype of mu; got mu float32, eps float64. "
        "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
    ),
    "clamp upside down": (
        lambda: rk.reparameterize(MU, X, clamp=(1.0, -1.0)),
        ValueError,
        "reparameterize: clamp must have low <= high; got (1.0, -1.0). Swap or correct the bounds.",
    ),
    "clamp nan": (
        lambda: rk.reparameterize(MU, X, clamp=(math.nan, 1.0)),
        ValueError,
        "reparameterize: clamp must have low <= high; got (nan, 1.0). Swap or correct the bounds.",
    ),
    "clamp one": (
        lambda: rk.reparameterize(MU, X, clamp=(1.0,)),
        TypeError,
        "reparameterize: clamp must be a pair (low, high); got (1.0,). Pass clamp=(-30.0, 20.0).",
    ),
    "param": (
        lambda: rk.reparameterize(MU, X, param="variance"),
        ValueError,
        "reparameterize: param must be one of logvar, logstd, std, softplus; got 'variance'. "
        "It says how the second argument reads.",
    ),
    "min_std": (
        lambda: rk.reparameterize(MU, X, min_std=0.1),
        ValueError,
        "reparameterize: min_std goes with param=\"softplus\" only; got min_std 0.1 with param 'logvar'. "
        "Leave min_std out, or use clamp.",
    ),
    "negative min_std": (
        lambda: rk.reparameterize(MU, X, param="softplus", min_std=-0.1),
        ValueError,
        "reparameterize: min_std must be finite and not negative; got -0.1. Pass 1e-4, for example.",
    ),
    "event_ndim": (
        lambda: rk.kl_divergence(MU, X, event_ndim=3),
        ValueError,
        "kl_divergence: event_ndim must lie in [0, 2], the number of dims of mu; got 3. "
        "Pass how many trailing dims of mu the KL sums over.",
    ),
    "sample_shape": (
        lambda: rk.reparameterize(MU, X, sample_shape=3),
        TypeError,
        "reparameterize: sample_shape must be a tuple of ints; got int. Pass sample_shape=(5,), for example.",
    ),
    "negative sample": (
        lambda: rk.reparameterize(MU, X, sample_shape=(-1,)),
        ValueError,
        "reparameterize: sample_shape must not be negative; got (-1,). Pass sample_shape=(5,), for example.",
    ),
    "prior": (
        lambda: rk.kl_divergence(MU, X, prior=3.0),
        TypeError,
        "kl_divergence: prior must be None or a pair (mu_p, second_p); got float. Pass prior=(mu_p, logvar_p).",
    ),
    "prior number": (
        lambda: rk.kl_divergence(MU, X, prior=(0.0, math.inf)),
        ValueError,
        "kl_divergence: second_p must be finite; got inf. A prior of infinite width has no KL.",
    ),
    "prior nan": (
        lambda: rk.kl_divergence(MU, X, prior=(math.nan, 0.0)),
        ValueError,
        "kl_divergence: mu_p must be finite; got nan. A prior of infinite width has no KL.",
    ),
    "prior shape": (
        lambda: rk.kl_divergence(MU, X, prior=(torch.zeros(3), 0.0)),
        ValueError,
        "kl_divergence: mu_p must expand to the shape of mu; got mu (64, 32), mu_p (3,). "
        "Give it size 1 in the dims along which it is shared.",
    ),
    "prior dtype": (
        lambda: rk.kl_divergence(MU, X, prior=(torch.zeros(32).double(), 0.0)),
        TypeError,
        "kl_divergence: mu_p must have the dtype of mu; got mu float32, mu_p float64. "
        "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
    ),
    "moments": (
        lambda: rk.DiagonalGaussian.from_moments(torch.zeros(2, 5)),
        ValueError,
        "DiagonalGaussian.from_moments: moments must have an even size in dim 1; got shape (2, 5). "
        "Let the encoder's last layer give twice the latent channels.",
    ),
    "other's param": (
        lambda: rk.DiagonalGaussian(MU, X).kl(rk.DiagonalGaussian(MU, X + 1, param="std")),
        ValueError,
        "DiagonalGaussian.kl: other must have the same param and min_std; got std, 0.0. "
        "Give both distributions the same parameterisation.",
    ),
    "other's kind": (
        lambda: rk.DiagonalGaussian(MU, X).rsample_kl((5,)),
        TypeError,
        "DiagonalGaussian.kl: other must be a DiagonalGaussian; got tuple. "
        "Make one of the prior's mu and logvar; sample_shape goes by its keyword.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_says_what_must_hold_what_it_got_and_what_to_do(case):
    call, kind, words = CASES[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == words
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("function", "keyword"),
    [
        (rk.reparameterize, "prior"),
        (rk.reparameterize, "event_ndim"),
        (rk.kl_divergence, "seed"),
        (rk.kl_divergence, "sample_shape"),
        (rk.reparameterize_kl, "temperature"),
        (rk.reference.reparameterize, "prior"),
        (rk.reference.kl_divergence, "eps"),
    ],
)
def test_a_keyword_that_means_nothing_is_a_type_error(function, keyword):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        function(MU, X, **{keyword: None})


def test_reference_checks_the_same():
    with pytest.raises(ValueError, match=r"reference\.reparameterize: logvar must have the shape of mu"):
        rk.reference.reparameterize(MU, X[:1])


def test_autocast_promotes_mixed_floats_to_the_widest():
    with torch.autocast("cpu"):
        z, kl = rk.reparameterize_kl(MU.bfloat16(), X, prior=(MU.half(), X.bfloat16()), seed=1)
    assert z.dtype == kl.dtype == torch.float32


# ---- the binding itself


def call_forward(**changed):
    tensors = {
        "mu": torch.zeros(4, 3),
        "x": torch.zeros(4, 3),
        "mu_p": None,
        "x_p": None,
        "seed": torch.tensor([1]),
        "eps": None,
        "z": torch.zeros(4, 3),
        "kl": torch.zeros(4),
    }
    options = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
    _C.forward(options, *{**tensors, **changed}.values(), 1)


def fake():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(4, 3)


BINDING = {
    "a list": ({"mu": [0.0]}, "mu must be a plain torch.Tensor"),
    "a meta tensor": ({"mu": torch.zeros(4, 3, device="meta")}, "mu must be a dense tensor with memory of its own"),
    "a sparse tensor": ({"x": torch.zeros(4, 3).to_sparse()}, "x must be a dense tensor with memory of its own"),
    "a fake tensor": ({"mu": fake}, "mu must be a plain torch.Tensor; got <class 'torch._subclasses.fake_tensor"),
    "no mu": ({"mu": None}, "mu and x must be given; got None"),
    "integers": ({"mu": torch.zeros(4, 3, dtype=torch.int32)}, "mu must be float16, bfloat16, float32 or float64"),
    "mixed dtypes": ({"x": torch.zeros(4, 3).double()}, "x must be float32; got float64"),
    "mixed shapes": ({"x": torch.zeros(4, 2)}, r"x must have the shape of mu, \(4, 3\); got \(4, 2\)"),
    "half a prior": ({"mu_p": torch.zeros(4, 3)}, "mu_p and x_p go together"),
    "small z": ({"z": torch.zeros(4, 2)}, r"z must end in the shape of mu, \(4, 3\); got \(4, 2\)"),
    "strided z": ({"z": torch.zeros(3, 4).t()}, "z must be contiguous"),
    "z's dtype": ({"z": torch.zeros(4, 3).half()}, "z must be float32; got float16"),
    "kl's shape": ({"kl": torch.zeros(3)}, r"kl must have leading dims of mu, \(4, 3\); got \(3,\)"),
    "kl's dtype": ({"kl": torch.zeros(4).double()}, "kl must be float32; got float64"),
    "no noise": ({"seed": None}, "z takes one of seed and eps"),
    "seed's dtype": ({"seed": torch.zeros(1)}, "seed must be int64"),
    "seed's count": ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must have one element or 4; got 2"),
    "strided seed": ({"seed": torch.tensor([1]).expand(4)}, "seed must be contiguous"),
    "eps's shape": ({"seed": None, "eps": torch.zeros(2, 4, 3)}, r"eps must have the shape of z, \(4, 3\)"),
}


@pytest.mark.parametrize("case", BINDING)
def test_binding_refuses_what_a_kernel_cannot_read(case):
    changed, words = BINDING[case]
    changed = {name: value() if callable(value) else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=f"reparam_kernels._C: .*{words}"):
        call_forward(**changed)


def test_binding_refuses_overlapping_gradients():
    options = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
    mu, seed = torch.zeros(4, 3), torch.tensor([1])
    overlap = torch.zeros(3).expand(4, 3)
    with pytest.raises(ValueError, match="dmu must have no overlap"):
        _C.backward(options, mu, mu, None, None, seed, None, mu, None, overlap, None, None, None, 1)
    with pytest.raises(ValueError, match="the prior's gradients need a prior"):
        _C.backward(options, mu, mu, None, None, seed, None, mu, None, None, None, mu.clone(), None, 1)


def test_binding_refuses_an_unknown_instruction_set():
    with pytest.raises(ValueError, match="instruction set: must be one that this CPU and build have"):
        _C.set_isa("mmx")
