"""The adapter beside diffusers itself: equal bits where the noise is theirs, equal numbers everywhere."""

import itertools
import sys

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderOobleck
from diffusers.models.autoencoders import autoencoder_kl, autoencoder_oobleck, vae

from reparam_kernels.integrations import diffusers as ours
from tests.cases import DTYPES, UNIT

pytestmark = pytest.mark.integrations

PAIRS = [
    (ours.DiagonalGaussianDistribution, vae.DiagonalGaussianDistribution),
    (ours.OobleckDiagonalGaussianDistribution, autoencoder_oobleck.OobleckDiagonalGaussianDistribution),
]
SHAPES = [(2, 6, 5), (3, 8, 4, 5), (1, 16, 8, 8), (2, 4, 3, 4, 5)]
GENERATORS = {
    "none": lambda n: None,
    "one": lambda n: torch.Generator().manual_seed(5),
    "list": lambda n: [torch.Generator().manual_seed(i) for i in range(n)],
    "list of one": lambda n: [torch.Generator().manual_seed(5)],
}


def moments(shape, dtype=torch.float32, seed=0):
    """Beyond the clamp at a few places."""
    out = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2
    out[0, -1, 0] = 21.0
    out[0, -1, 1] = -31.0
    return out


def states(generator):
    listed = generator if isinstance(generator, list) else [generator]
    return [torch.get_rng_state() if g is None else g.get_state() for g in listed]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=["kl", "oobleck"])
def test_samples_gradients_and_streams_are_theirs_to_the_bit(mine, theirs, dtype, kind, deterministic):
    for shape in SHAPES:
        results = []
        for cls in (mine, theirs):
            torch.manual_seed(11)
            parameters = moments(shape, dtype).requires_grad_()
            generator = GENERATORS[kind](shape[0])
            posterior = cls(parameters, deterministic)
            z = posterior.sample(generator)
            z.backward(moments(z.shape, dtype, seed=3))
            results.append((z, parameters.grad, *states(generator)))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=["kl", "oobleck"])
def test_every_attribute_is_theirs_to_the_bit(mine, theirs, dtype, deterministic):
    for shape in SHAPES:
        p, q = (cls(moments(shape, dtype), deterministic=deterministic) for cls in (mine, theirs))
        names = [name for name in vars(q) if name != "deterministic"]
        assert {"parameters", "mean", "logvar", "std", "var"} <= set(names)
        for name in names:
            a, b = getattr(p, name), getattr(q, name)
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
        assert p.deterministic is q.deterministic
        assert torch.equal(p.mode(), q.mode())
        missing = [name for name in dir(q) if not name.startswith("_") and not hasattr(p, name)]
        assert missing == []


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=["kl", "oobleck"])
def test_kl_and_nll_and_their_gradients_are_theirs(mine, theirs, dtype, deterministic):
    """Theirs in float64 is the truth: in the half dtypes theirs overflows. Both have the upstream bugs."""
    halved = dtype in (torch.float16, torch.bfloat16)
    for shape, against in itertools.product(SHAPES, [None, "own", "crossed"]):
        a, b = (moments(shape, dtype, seed).requires_grad_() for seed in (0, 1))
        wide = [t.detach().double().requires_grad_() for t in (a, b)]
        q, true = mine(a, deterministic), theirs(wide[0], deterministic)
        other = {None: None, "own": mine(b), "crossed": theirs(b)}[against]
        other_true = None if against is None else theirs(wide[1])
        # a prior in a half dtype comes through their clamp and exp, and has been rounded
        slack = 2e-6 + (32 * UNIT[dtype] if halved and against else 0)
        pairs = [(outcome(q.kl, other), outcome(true.kl, other_true))]
        if hasattr(true, "nll"):
            sample = moments(q.mean.shape, dtype, seed=2)
            pairs += [(outcome(q.nll, sample), outcome(true.nll, sample.double()))]
            pairs += [(outcome(q.nll, sample, [1]), outcome(true.nll, sample.double(), [1]))]
        for got, want in pairs:
            if want is IndexError:
                assert got is IndexError
                continue
            assert got.shape == want.shape
            torch.testing.assert_close(got.double(), want.double(), rtol=slack, atol=1e-5)
            assert got.requires_grad == want.requires_grad
            if got.requires_grad:
                mine_grads = torch.autograd.grad(got.sum(), (a, b), retain_graph=True, allow_unused=True)
                true_grads = torch.autograd.grad(want.sum(), wide, retain_graph=True, allow_unused=True)
                for g, w in zip(mine_grads, true_grads, strict=True):
                    assert (g is None) == (w is None)
                    if g is not None:
                        limit = torch.finfo(dtype).max
                        g, w = g.double().clamp(-limit, limit), w.clamp(-limit, limit)
                        torch.testing.assert_close(g, w, rtol=slack + 8 * UNIT[dtype], atol=1e-4 if halved else 1e-5)


def outcome(call, *args):
    try:
        return call(*args)
    except IndexError:
        return IndexError


@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=["kl", "oobleck"])
def test_the_philox_noise_has_their_distribution(mine, theirs):
    """And the gradients that their z would have with the same noise."""
    leaves = [torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    q, p = mine(leaves[0], noise="philox"), theirs(leaves[1])
    z = q.sample(torch.Generator().manual_seed(1))
    eps = ((z - p.mean) / p.std).detach()
    assert abs(eps.mean()) < 5 / 4096**0.5
    assert abs(eps.std() - 1) < 4 / 4096**0.5
    assert eps.abs().max() < 5
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    z.backward(dz)
    (p.mean + p.std * eps).backward(dz)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


def tiny():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def train(steps=20, autocast=False):
    model = tiny()
    torch.manual_seed(1)
    images = torch.rand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    losses, first = [], None
    for _ in range(steps):
        with torch.autocast("cpu", enabled=autocast):
            posterior = model.encode(images).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample
            loss = (decoded.float() - images).square().mean() + 0.01 * posterior.kl().float().mean()
        first = decoded.detach() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def test_a_tiny_autoencoder_trains_to_the_same_losses():
    losses, first = train()
    with ours.patch():
        patched, first_patched = train()
    assert torch.equal(first, first_patched)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(losses), rtol=2e-4, atol=0)
    torch.testing.assert_close(torch.tensor(patched[:5]), torch.tensor(losses[:5]), rtol=1e-5, atol=0)


def test_it_trains_with_the_fast_noise_and_under_autocast():
    losses, _ = train()
    with ours.patch(noise="philox"):
        fast, _ = train()
        half, _ = train(autocast=True)
    assert fast != losses
    assert abs(fast[-1] / losses[-1] - 1) < 0.2
    assert abs(half[-1] / losses[-1] - 1) < 0.2


def test_images_stay_the_same():
    model = tiny()
    image = torch.rand(2, 3, 16, 16)
    calls = [
        lambda: model(image, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample,
        lambda: model(image).sample,
        lambda: model.encode(image).latent_dist.sample([torch.Generator().manual_seed(i) for i in (3, 4)]),
    ]
    before = [call() for call in calls]
    with ours.patch():
        assert type(model.encode(image).latent_dist).__mro__[1] is ours.DiagonalGaussianDistribution
        assert all(torch.equal(call(), b) for call, b in zip(calls, before, strict=True))


def test_the_audio_autoencoder_stays_the_same():
    torch.manual_seed(0)
    model = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        decoder_channels=4,
        decoder_input_channels=3,
        channel_multiples=[1, 2],
    )
    audio = torch.rand(2, 2, 64)

    def run():
        posterior = model.encode(audio).latent_dist
        return posterior.sample(torch.Generator().manual_seed(3)), posterior.kl()

    z, kl = run()
    with ours.patch():
        assert type(model.encode(audio).latent_dist).__mro__[1] is ours.OobleckDiagonalGaussianDistribution
        z_patched, kl_patched = run()
    assert torch.equal(z, z_patched)
    torch.testing.assert_close(kl_patched, kl)


def test_patch_reaches_every_module_and_restores_all():
    theirs = {vae.DiagonalGaussianDistribution, autoencoder_oobleck.OobleckDiagonalGaussianDistribution}

    def holders(classes):
        return {
            f"{name}.{key}"
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "diffusers"
            for key, value in list(vars(module).items())
            if isinstance(value, type) and value in classes
        }

    before = holders(theirs)
    assert len(before) > 3
    patch = ours.patch()
    assert set(patch.rebound) == before
    assert holders(theirs) == set()
    with pytest.raises(RuntimeError, match="must not be patched already"):
        ours.patch()
    patch.restore()
    assert holders(theirs) == before
    assert autoencoder_kl.DiagonalGaussianDistribution in theirs
