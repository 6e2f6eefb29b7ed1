"""Launches that reach a stub of the CUDA driver. `python -m tests.gpu_plans` prints the error of each check as JSON.

It runs in a separate process, since Triton cannot compile in the interpreter of the other tests.
"""

import ctypes
import json
import os
import threading
import traceback
from unittest import mock

import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import driver

import reparam_kernels as rk
from bench.host import stub_driver
from reparam_kernels.gpu import launch as launcher

SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


def leaves(value):
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (tuple, list)) else [value]


def step(batch=8, width=20, seed=1, skew=0, prior=False, z=True, shape=None, **options):
    """Run one call forward and backward. skew: how many elements mu lies beyond an aligned address."""
    shape = shape or (batch, width)
    n = torch.Size(shape).numel()
    mu = torch.zeros(n + skew)[skew:].view(shape).requires_grad_()
    x = torch.zeros(shape, requires_grad=True)
    options["prior"] = (torch.zeros(shape), torch.zeros(shape)) if prior else None
    out = rk.reparameterize_kl(mu, x, seed=seed, **options) if z else [rk.kl_divergence(mu, x, **options)]
    torch.autograd.grad(out, (mu, x), [torch.ones_like(t) for t in out])


def bytes_of(stub, launch, tensors, compiled):
    """Launch, and return what reached the driver: function, stream, grid, block, shared memory and each parameter."""
    types = [t for t in leaves(list(compiled.src.signature.values())) if t != "constexpr"]
    sizes = bytes(8 if t.startswith("*") else SIZES[t] for t in types) + bytes([8, 8])  # and two scratch pointers
    stub.stub_parameters(sizes, len(sizes))
    launch(*tensors)
    stub.stub_parameters(b"", 0)  # another kernel has fewer
    out = ctypes.create_string_buffer(4096)
    count = stub.stub_last_launch(out)
    return out.raw[:count]


def check_a_plan_passes_the_bytes_that_triton_passes(stub):
    ours = launcher.Launch.__call__
    direct = 0

    def both(launch, *tensors):
        nonlocal direct

        def by_triton(*tensors):
            return launcher.launch(
                launch.kernel, launch.grid, launch.device, *tensors, *launch.arguments, **launch.options
            )

        compiled = by_triton(*tensors)
        direct += launch._run is not None
        got = bytes_of(stub, lambda *tensors: ours(launch, *tensors), tensors, compiled)
        want = bytes_of(stub, by_triton, tensors, compiled)
        assert tensors[0].data_ptr().to_bytes(8, "little") in got
        assert got == want, launch.kernel

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(
        batch=st.integers(1, 300),
        seed=st.integers(0, 3),
        skew=st.sampled_from([0, 0, 1, 4]),
        kind=st.sampled_from([{}, {"prior": True}, {"z": False}]),
    )
    def explore(batch, seed, skew, kind):
        for _ in range(2):  # the second call finds the plan of the first
            step(batch=batch, seed=seed, skew=skew, **kind)

    with mock.patch.object(launcher.Launch, "__call__", both):
        explore()
        step(shape=(4, 3000))  # with a launch that adds up the parts of the KL
        step(shape=(4, 3000))
    assert direct > 150, direct


def check_a_plan_is_of_one_address_dtype_shape_and_option(stub):
    base, kinds = len(launcher.PLANS), [{}, {"skew": 1}, {"batch": 9}, {"prior": True}, {"z": False}, {"event_ndim": 2}]
    for i, kind in enumerate(kinds):
        step(**kind)
        step(**kind)
        assert len(launcher.PLANS) == base + 2 * (i + 1), kind
    keys = [launcher.signatures(torch.zeros(4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    assert keys[0] != keys[1]
    assert all(torch.device("cpu") in key[1:] for key in launcher.PLANS)


def check_a_launch_is_under_its_device_and_on_the_current_stream(stub):
    launcher.PLANS.clear()
    step()
    plan = next(plan for key, plan in launcher.PLANS.items() if key[0] == "forward")
    seen = []

    def see(launch, *tensors):
        seen.append(tensors)

    with mock.patch.object(launcher.Launch, "__call__", see):
        step()
    (tensors, *_), active = seen, driver.active
    compiled = launcher.launch(plan.launch.kernel, (1,), torch.device("cpu"), *tensors, *plan.launch.arguments,
                               **plan.launch.options)  # fmt: skip
    streams = []
    for stream in (0, 77):
        with mock.patch.object(active, "get_current_stream", return_value=stream):
            streams.append(int.from_bytes(bytes_of(stub, plan.launch, tensors, compiled)[8:16], "little"))
    assert streams == [0, 77], streams
    guarded = []

    def guard(device):
        guarded.append(device)
        return mock.patch.object(active, "get_current_device", return_value=0)

    before = stub.stub_launches()
    with (
        mock.patch.object(active, "get_current_device", return_value=1),
        mock.patch.object(launcher, "device_guard", guard),
    ):
        plan.launch(*tensors)
    assert guarded == [torch.device("cpu")]
    assert stub.stub_launches() == before + 1


def check_launch_hooks_fire(stub):
    step()
    entered, left = [], []
    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(entered.append)
    runtime.launch_exit_hook.add(left.append)
    try:
        step()
    finally:
        runtime.launch_enter_hook.remove(entered.append)
        runtime.launch_exit_hook.remove(left.append)
    assert [data.get()["name"] for data in entered] == ["forward_kernel", "backward_kernel"]
    assert len(left) == 2
    step()
    assert len(entered) == 2


def check_the_plans_are_bounded(stub):
    launcher.PLANS.clear()
    with mock.patch.object(launcher.Plans, "LIMIT", 5):
        for batch in range(1, 20):
            step(batch=batch)
            assert len(launcher.PLANS) <= 5


def check_threads_and_forks(stub):
    launcher.PLANS.clear()
    before, errors = stub.stub_launches(), []

    def work():
        try:
            for batch in (5, 6, 7) * 20:
                step(batch=batch)
        except Exception:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert stub.stub_launches() == before + 4 * 60 * 2
    child = os.fork()
    if child == 0:
        mu = torch.zeros(5, 20)
        rk.reparameterize_kl(mu, mu, seed=1)
        os._exit(0 if stub.stub_launches() == before + 4 * 60 * 2 + 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check_another_triton_launches_as_usual(stub):
    launcher.PLANS.clear()
    before = stub.stub_launches()
    with mock.patch.object(launcher, "KNOWN", False):
        for _ in range(3):
            step()
    assert stub.stub_launches() == before + 6
    assert all(plan.launch._run is None for plan in launcher.PLANS.values())
    launcher.PLANS.clear()


def modules(stub, shapes, **options):
    before = stub.stub_modules()
    for shape in shapes:
        step(shape=shape, **options)
    return stub.stub_modules() - before


def check_every_batch_of_a_width_has_the_kernels_of_the_first(stub):
    for width in (3, 20, 64):
        modules(stub, [(128, width)])
        assert modules(stub, [(batch, width) for batch in (1, 2, 3, 4, 8, 16, 17, 96, 256, 999, 1000)]) == 0, width
    modules(stub, [(1, 20)], event_ndim=0)
    assert modules(stub, [(batch, 20) for batch in (2, 16, 300)], event_ndim=0) == 0


def check_every_length_has_one_of_four_kernels(stub):
    assert modules(stub, [(8, length, 32) for length in range(1, 501)]) <= 2 * 4 + 1  # and the sum of the parts


def main():
    errors = {}
    with stub_driver() as stub:
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                try:
                    check(stub)
                except Exception:
                    errors[name] = traceback.format_exc()
                else:
                    errors[name] = None
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
