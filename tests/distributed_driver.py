"""Runs in each process of `tests/test_distributed.py`: DTensors against the same call on one process."""

import itertools
import math
import re
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import reparam_kernels as rk

SHAPE, SAMPLES = (5, 3, 6), (2,)  # no size is a multiple of four
PLACEMENTS = (Shard(0), Shard(1), Shard(2), Replicate())


def meshes(world):
    yield init_device_mesh("cpu", (world,))
    if world == 4:
        yield init_device_mesh("cpu", (2, 2))


def parts(t, mesh, placements=None):
    return distribute_tensor(t.detach(), mesh, placements or [Replicate()] * mesh.ndim)


def near(got, want):
    torch.testing.assert_close(got.full_tensor(), want, rtol=1e-5, atol=1e-5)


def check_every_placement(mesh):
    """z by bits; kl, log_q and every gradient to rounding; the places of each output."""
    torch.manual_seed(0)
    mu, x = torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE).requires_grad_()
    prior = torch.randn(3, 6).requires_grad_(), torch.randn(1, 6).requires_grad_()
    dz, rows = torch.randn(*SAMPLES, *SHAPE), torch.randn(*SAMPLES, 5, 3)
    for seed, op in itertools.product((7, torch.arange(5)), (rk.reparameterize_kl, rk.reparameterize_mc_kl)):
        options = {"seed": seed, "sample_shape": SAMPLES, "event_ndim": 1}
        z, kl = op(mu, x, prior=prior, **options)
        dkl = rows[0] if kl.dim() == 2 else rows
        want = torch.autograd.grad((z, kl), (mu, x, *prior), (dz, dkl))
        for placements in itertools.product(PLACEMENTS, repeat=mesh.ndim):
            leaves = [parts(t, mesh, placements).requires_grad_() for t in (mu, x)]
            leaves += [parts(t, mesh).requires_grad_() for t in prior]
            got_z, got_kl = op(*leaves[:2], prior=tuple(leaves[2:]), **options)
            assert torch.equal(got_z.full_tensor(), z), placements
            near(got_kl, kl)
            for at, of_z, of_kl in zip(placements, got_z.placements, got_kl.placements, strict=True):
                assert of_z == (Shard(at.dim + 1) if at.is_shard() else at)
                samples = got_kl.dim() - 2
                assert of_kl == (Partial() if at == Shard(2) else Shard(at.dim + samples) if at.is_shard() else at)
            loss = (got_z * parts(dz, mesh, got_z.placements)).sum() + (got_kl * parts(dkl, mesh)).sum()
            loss.backward()
            for leaf, grad in zip(leaves, want, strict=True):
                assert leaf.grad.shape == grad.shape
                near(leaf.grad, grad)


def check_a_sharded_prior_eps_and_moments(mesh):
    torch.manual_seed(0)
    four = [torch.randn(SHAPE) for _ in range(4)]
    eps = torch.randn(SHAPE)
    placements = [Shard(0)] + [Shard(1)] * (mesh.ndim - 1)
    sharded = [parts(t, mesh, placements) for t in four]
    near(rk.kl_divergence(*sharded[:2], prior=tuple(sharded[2:])), rk.kl_divergence(*four[:2], prior=tuple(four[2:])))
    near(rk.kl_divergence(*sharded[:2], prior=(0.5, 1.0)), rk.kl_divergence(*four[:2], prior=(0.5, 1.0)))
    near(rk.reparameterize(*sharded[:2], eps=parts(eps, mesh, placements)), rk.reparameterize(*four[:2], eps=eps))
    moments = torch.randn(4, 6, 7).requires_grad_()
    whole = rk.DiagonalGaussian.from_moments(moments).rsample(seed=3)
    whole.sin().sum().backward()
    leaf = parts(moments, mesh, [Shard(2)] * mesh.ndim).requires_grad_()
    z = rk.DiagonalGaussian.from_moments(leaf).rsample(seed=3)
    assert torch.equal(z.full_tensor(), whole)
    z.sin().sum().backward()
    near(leaf.grad, moments.grad)


def check_a_dtensor_may_lie_in_a_window(mesh):
    mu, x = torch.randn(2, 8, 6).unbind()
    for seed in (3, torch.arange(20)):
        whole = rk.reparameterize(*(torch.zeros(20, 9).index_put((torch.arange(8)[:, None] + 4, torch.arange(6) + 1), t)
                                    for t in (mu, x)), seed=seed)  # fmt: skip
        sharded = [parts(t, mesh, [Shard(0)] * mesh.ndim) for t in (mu, x)]
        z = rk.reparameterize(*sharded, seed=seed, window=((20, 9), (4, 1)))
        assert torch.equal(z.full_tensor(), whole[4:12, 1:7])


def check_draws(mesh):
    """Default generators that are the same on all processes draw one seed."""
    like = parts(torch.zeros(SHAPE), mesh, [Shard(0)] * mesh.ndim)
    assert torch.equal(rk.randn_like(like, seed=3).full_tensor(), rk.randn(SHAPE, seed=3))
    torch.manual_seed(5)
    want = rk.reparameterize(torch.zeros(SHAPE), torch.zeros(SHAPE))
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(rk.reparameterize(like, like).full_tensor(), want)


def check_other_seeds_on_some_processes_are_found(mesh):
    from reparam_kernels.core import dtensor

    if dist.get_world_size() == 1:
        return
    like = parts(torch.zeros(SHAPE), mesh, [Shard(0)] * mesh.ndim)
    rank = dist.get_rank()
    for drawn in (False, True):
        dtensor.CHECKED.clear()
        torch.manual_seed(rank // 3 if dist.get_world_size() > 2 else rank)  # the last one alone, if there are four
        seed = None if drawn else torch.initial_seed()
        refused(
            ValueError,
            "the seed must be the same on all processes",
            lambda s=seed: rk.reparameterize(like, like, seed=s),
        )
    dtensor.CHECKED.clear()
    torch.manual_seed(0)


def refused(kind, words, call):
    with pytest.raises(kind, match=re.escape(words)):
        call()


def check_what_cannot_be_had_is_refused(mesh):
    if mesh.ndim > 1:
        return
    plain = torch.zeros(8, 6)
    rows, cols = parts(plain, mesh, [Shard(0)]), parts(plain, mesh, [Shard(1)])
    partial = rows.sum(0, keepdim=True)
    learned = torch.zeros((), requires_grad=True)
    refused(TypeError, "must have the placements Shard and Replicate", lambda: rk.kl_divergence(partial, partial))
    refused(ValueError, "logvar must lie on the mesh of mu", lambda: rk.kl_divergence(rows, cols))
    refused(TypeError, "logvar must be a DTensor", lambda: rk.kl_divergence(rows, plain))
    refused(TypeError, "mu must be a DTensor", lambda: rk.kl_divergence(plain, rows))
    refused(TypeError, "mu_p must be a DTensor", lambda: rk.kl_divergence(rows, rows, prior=(plain, plain)))
    refused(TypeError, "second_p must be a DTensor", lambda: rk.kl_divergence(rows, rows, prior=(0.0, learned)))
    refused(ValueError, "mu_p must lie on the mesh of mu", lambda: rk.kl_divergence(rows, rows, prior=(cols, cols)))
    one = parts(torch.zeros(1, 6), mesh, [Shard(0)])
    refused(ValueError, "must have the shape of mu if it is sharded",
            lambda: rk.kl_divergence(rows, rows, prior=(one, one)))  # fmt: skip
    refused(ValueError, "moments must not be sharded in dim 1",
            lambda: rk.DiagonalGaussian.from_moments(cols).rsample())  # fmt: skip
    refused(TypeError, "the op mixture must get tensors of this process",
            lambda: rk.mixture_log_prob(rows, rows, rows))  # fmt: skip
    if dist.get_world_size() > 1:  # the import of the compiler takes seconds in each
        return
    compiled = torch.compile(rk.kl_divergence, backend="eager", fullgraph=True)
    refused(Exception, "compiled code must call on tensors of this process", lambda: compiled(rows, rows))


def check_ranks_without_elements(mesh):
    mu = torch.randn(1, 6)
    sharded = parts(mu, mesh, [Shard(0)] * mesh.ndim)
    z, kl = rk.reparameterize_kl(sharded, sharded, seed=torch.tensor([4]))
    want = rk.reparameterize_kl(mu, mu, seed=torch.tensor([4]))
    assert torch.equal(z.full_tensor(), want[0])
    near(kl, want[1])
    assert math.prod(z.to_local().shape) == (6 if sum(mesh.get_coordinate()) == 0 else 0)


if __name__ == "__main__":
    rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    for mesh in meshes(world):
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                check(mesh)
                print(name)
    dist.barrier()
    dist.destroy_process_group()
