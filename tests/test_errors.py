"""Every error is checked word for word. Each reads `where: what must hold; got what. Do this.`"""

import math

import numpy as np
import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import _C
from reparam_kernels.ops.latent import cpu
from reparam_kernels.ops.latent.arguments import make_arguments

pytestmark = pytest.mark.usefixtures("says_where")

MU, X = torch.zeros(64, 32), torch.zeros(64, 32)
ASK_WINDOW = "Pass window=(whole_shape, start), for example ((64, 20), (16, 0)) for rows 16 and up of 64."
ASK_SEED = "Pass an int in [-2**63, 2**64), or an int64 tensor on mu's device."

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
    "mixed dtypes on a device without autocast": (
        lambda: rk.kl_divergence(MU.to("meta"), X.half().to("meta")),
        TypeError,
        "kl_divergence: logvar must have the dtype of mu; got mu float32, logvar float16. "
        "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
    ),
    "a prior beyond float32": (
        lambda: rk.kl_divergence(MU, X, prior=(1e300, 0.0)),
        ValueError,
        "kl_divergence: mu_p must fit float32; got 1e+300. Use float64 throughout.",
    ),
    "samples of a head in eval": (
        lambda: rk.GaussianHead(32, 2, mean_in_eval=True).eval()(MU, sample_shape=(-1,)),
        ValueError,
        "GaussianHead: sample_shape must not be negative; got (-1,). Pass sample_shape=(5,), for example.",
    ),
    "two sources for a head in eval": (
        lambda: rk.GaussianHead(32, 2, mean_in_eval=True).eval()(MU, seed=1, eps=MU),
        ValueError,
        "GaussianHead: at most one of seed, generator and eps may be given; got seed and eps. "
        "Keep the one that should decide the noise.",
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
        lambda: rk.reparameterize(MU, X, seed=-(2**63) - 1),
        ValueError,
        "reparameterize: seed must lie in [-2**63, 2**64); got -9223372036854775809. "
        "Reduce it, for example modulo 2**64.",
    ),
    "large seed": (
        lambda: rk.randn(3, seed=2**64),
        ValueError,
        "randn: seed must lie in [-2**63, 2**64); got 18446744073709551616. Reduce it, for example modulo 2**64.",
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
        "Pass how many trailing dims of mu the sum runs over.",
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
        "kl_divergence: prior must be None, a pair (mu_p, second_p), a DiagonalGaussian or a Normal; got float. "
        "Pass prior=(mu_p, logvar_p).",
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
    "moments dim": (
        lambda: rk.DiagonalGaussian.from_moments(torch.zeros(2, 4), dim=9),
        ValueError,
        "DiagonalGaussian.from_moments: dim must be one of the 2 dims of moments; got 9, and moments of shape (2, 4). "
        "Pass the dim that holds mu and logvar.",
    ),
    "other's param": (
        lambda: rk.DiagonalGaussian(MU, X, param="softplus").kl(rk.DiagonalGaussian(MU, X + 1, param="std")),
        ValueError,
        "DiagonalGaussian.kl: a prior for a posterior with param softplus must have its param and min_std, "
        "('softplus', 0.0); got ('std', 0.0). Give both distributions the same parameterisation.",
    ),
    "log_prob": (
        lambda: rk.DiagonalGaussian(MU, X).log_prob(torch.zeros(3)),
        ValueError,
        "DiagonalGaussian.log_prob: z must broadcast with mu; got mu (64, 32), z (3,). "
        "Give z the shape of mu, after any sample dims.",
    ),
    "two distributions": (
        lambda: rk.kl_divergence(torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 1.0)),
        TypeError,
        "kl_divergence: mu must be a torch.Tensor; got Normal. "
        "For two distributions call torch.distributions.kl_divergence(q, p).",
    ),
    "noise dtype": (
        lambda: rk.randn(3, dtype=torch.int),
        TypeError,
        "randn: dtype must be float16, bfloat16, float32 or float64; got int32. Pass dtype=torch.float32.",
    ),
    "noise size": (
        lambda: rk.randn(),
        TypeError,
        "randn: size must be ints or one tuple of ints; got nothing. Pass (2, 3), for example.",
    ),
    "head's param": (
        lambda: rk.GaussianHead(3, 2, param="x"),
        ValueError,
        "GaussianHead: param must be one of logvar, logstd, std, softplus; got 'x'. "
        "It says how the second argument reads.",
    ),
    "backend of a list": (
        lambda: rk.backend_for([1]),
        TypeError,
        "backend_for: tensor must be a torch.Tensor; got list. Pass a tensor on the device in question.",
    ),
    "generator of draw_seed": (
        lambda: rk.draw_seed(generator=3),
        TypeError,
        "draw_seed: generator must be a torch.Generator; got int. "
        "Make one with torch.Generator(device).manual_seed(0), or pass seed=.",
    ),
    "other's kind": (
        lambda: rk.DiagonalGaussian(MU, X).rsample_kl((5,)),
        TypeError,
        "DiagonalGaussian.kl: other must be a DiagonalGaussian or a torch.distributions.Normal; got tuple. "
        "Make one of the prior's mu and logvar; sample_shape goes by its keyword.",
    ),
    "a window that is no pair": (
        lambda: rk.randn(3, seed=1, window=(5, 2, 1)),
        TypeError,
        f"randn: window must be a pair (whole_shape, start); got 3 items. {ASK_WINDOW}",
    ),
    "a window's numbers": (
        lambda: rk.reparameterize(MU, X, window=((128.0, 32), (0, 0))),
        TypeError,
        f"reparameterize: each of the whole shape of window must be an int; got float. {ASK_WINDOW}",
    ),
    "a window's dims": (
        lambda: rk.reparameterize_kl(MU, X, window=((128,), (64,))),
        ValueError,
        "reparameterize_kl: window must have one size and one start for each of the 2 dims; got 1 sizes and 1 starts. "
        f"{ASK_WINDOW}",
    ),
    "a window that does not hold mu": (
        lambda: rk.DiagonalGaussian(MU, X).rsample(window=((100, 32), (64, 0))),
        ValueError,
        "DiagonalGaussian: window must hold a tensor of shape (64, 32) inside the whole; got the whole shape (100, 32) "
        "and start (64, 0). Correct one of them.",
    ),
    "a window in too large a whole": (
        lambda: rk.reparameterize(MU, X, sample_shape=(4,), window=((2**40, 2**21), (0, 0))),
        ValueError,
        "reparameterize: window must lie in a whole of at most 2**62 elements; got "
        "(4, 1099511627776, 2097152) with the samples. Give each item a seed, and call once for each group of items.",
    ),
    "a window and eps": (
        lambda: rk.reparameterize(MU, X, eps=MU, window=((128, 32), (0, 0))),
        ValueError,
        "reparameterize: window goes with noise that the call makes; got eps and window. Cut eps to the window before "
        "the call, and leave window out.",
    ),
    "seeds of a window": (
        lambda: rk.reparameterize(MU, X, seed=torch.arange(64), window=((128, 32), (64, 0))),
        ValueError,
        "reparameterize: a seed tensor must have one element, or shape (128,), one for each leading item; "
        "got shape (64,). Give one seed for the call, or one for each item of the leading dim.",
    ),
    "a window of a head in eval": (
        lambda: rk.GaussianHead(32, 2, mean_in_eval=True).eval()(MU, window=((4, 2), (0, 0))),
        ValueError,
        "GaussianHead: window must hold a tensor of shape (64, 2) inside the whole; got the whole shape (4, 2) and "
        "start (0, 0). Correct one of them.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_says_what_must_hold_what_it_got_and_what_to_do(case):
    call, kind, words = CASES[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == words
    assert type(caught.value) is kind


@pytest.mark.parametrize("pair", [(-0.5, 0.5), [-0.5, 0.5], np.array([-0.5, 0.5]), (np.float32(-0.5), np.float64(0.5))])
def test_options_may_come_from_a_config(pair):
    want = rk.reparameterize_kl(MU, X, seed=1, clamp=(-0.5, 0.5), event_ndim=1, sample_shape=(2,))
    got = rk.reparameterize_kl(MU, X, seed=1, clamp=pair, event_ndim=np.int64(1), sample_shape=np.array([2]))
    assert all(map(torch.equal, got, want))
    floor = np.float32(0.25)
    assert torch.equal(*(rk.kl_divergence(MU, X, param="softplus", min_std=m) for m in (floor, 0.25)))


@pytest.mark.parametrize("option", [{"event_ndim": True}, {"sample_shape": (True,)}, {"clamp": (True, 2.0)}], ids=str)
def test_an_equal_key_in_a_cache_does_not_pass_a_wrong_type(option):
    (name,) = option
    as_number = {"event_ndim": 1, "sample_shape": (1,), "clamp": (1.0, 2.0)}
    rk.reparameterize_kl(MU, X, **{name: as_number[name]})
    with pytest.raises(TypeError, match="got bool"):
        rk.reparameterize_kl(MU, X, **option)


def test_a_trace_by_fx_runs_or_says_what_to_do():
    head, h = rk.GaussianHead(32, 2), torch.ones(3, 32)
    traced = torch.fx.symbolic_trace(head)
    assert all(map(torch.equal, traced(h, seed=5), head(h, seed=5)))
    for trace in (rk.GaussianHead(32, 2, mean_in_eval=True).eval(), lambda mu, x: rk.kl_divergence(mu, x)):
        with pytest.raises(TypeError, match=r"got Proxy. torch.fx.symbolic_trace cannot see into this call: mark it"):
            torch.fx.symbolic_trace(trace)


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
        "log_q": None,
    }
    options = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
    _C.latent_forward(options, 1, *{**tensors, **changed}.values())


def fake():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(4, 3)


BINDING = {
    "a list": ("mu", [0.0]),
    "a meta tensor": ("mu", torch.zeros(4, 3, device="meta")),
    "a sparse tensor": ("x", torch.zeros(4, 3).to_sparse()),
    "a fake tensor": ("mu", fake),
    "no mu": ("mu", None),
    "no x": ("x", None),
    "integers": ("mu", torch.zeros(4, 3, dtype=torch.int32)),
    "mixed dtypes": ("x", torch.zeros(4, 3).double()),
    "mixed shapes": ("x", torch.zeros(4, 2)),
    "half a prior": ("x_p", torch.zeros(4, 3)),
    "small z": ("z", torch.zeros(4, 2)),
    "overlapping z": ("z", torch.zeros(3).expand(4, 3)),
    "z's dtype": ("z", torch.zeros(4, 3).half()),
    "kl's shape": ("kl", torch.zeros(3)),
    "kl's dtype": ("kl", torch.zeros(4).double()),
    "no noise": ("seed", None),
    "seed's dtype": ("seed", torch.zeros(1)),
    "seed's count": ("seed", torch.zeros(2, dtype=torch.int64)),
    "strided seed": ("seed", torch.tensor([1]).expand(4)),
    "too many elements": ("mu", torch.zeros(1).expand(2**63 - 1)),
    "a stride too far": ("mu", torch.empty(0).as_strided((0, 4), (1, 2**62))),
}


@pytest.mark.parametrize("case", BINDING)
def test_binding_names_the_argument_that_a_kernel_cannot_read(case):
    name, value = BINDING[case]
    refused = "mu_p" if case == "half a prior" else name
    with pytest.raises(_C.InvalidArgument, match=f"^{refused}$"):
        call_forward(**{name: value() if callable(value) else value})


def test_binding_refuses_eps_of_another_shape():
    with pytest.raises(_C.InvalidArgument, match=r"^eps$"):
        call_forward(seed=None, eps=torch.zeros(2, 4, 3))


def test_binding_refuses_overlapping_gradients_and_those_of_no_prior():
    options = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
    mu, seed = torch.zeros(4, 3), torch.tensor([1])
    overlap = torch.zeros(3).expand(4, 3)
    with pytest.raises(_C.InvalidArgument, match=r"^dmu$"):
        _C.latent_backward(options, 1, mu, mu, None, None, seed, None, mu, None, None, overlap, None, None, None)
    with pytest.raises(_C.InvalidArgument, match=r"^dmu_p$"):
        _C.latent_backward(options, 1, mu, mu, None, None, seed, None, mu, None, None, None, None, mu.clone(), None)


def test_binding_refuses_an_unknown_instruction_set():
    with pytest.raises(_C.InvalidArgument, match=r"^isa$"):
        _C.set_isa("mmx")


def without_memory():
    t = torch.zeros(4, 3)
    t.untyped_storage().resize_(0)
    return t


REFUSED = {
    "no memory": (without_memory, r"mu must have memory; got a storage of 0 bytes\."),
    "too many elements": (
        lambda: torch.zeros(1).expand(2**63 - 1),
        r"mu must have at most 64 dims and 2\*\*62 elements",
    ),
    "a stride too far": (
        lambda: torch.empty(0).as_strided((0, 4), (1, 2**62)),
        r"mu must have .* span less than 2\*\*62;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_of_the_extension_is_explained(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=f"^reparam_kernels: {words}"):
        rk.kl_divergence(make(), make())


@pytest.mark.parametrize(
    ("dz", "words"),
    [
        (torch.ones(4, 3).to_sparse(), r"dense tensor on the CPU; got torch\.sparse_coo on cpu\."),
        (fake(), r"plain torch\.Tensor; got FakeTensor\."),
    ],
)
def test_a_refused_gradient_is_explained(dz, words):
    z = rk.reparameterize(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3), seed=1)
    with pytest.raises(ValueError, match=f"^reparam_kernels: dz must be a {words}"):
        z.backward(dz)


def test_a_refusal_of_two_tensors_that_do_not_fit_is_explained():
    mu, x = torch.zeros(4, 3), torch.zeros(4, 2)
    call = make_arguments("test", mu, mu, kl=True)._replace(x=x)
    with pytest.raises(ValueError, match=r"^reparam_kernels: x must fit the other tensors .* shape \(4, 2\)"):
        cpu.forward(call)
