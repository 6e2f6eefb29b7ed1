"""Which backend runs, and the message if it cannot. Each test runs in its own process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest


def python(code, expect=0, timeout=60, **env):
    """Run code in a fresh interpreter; an env value of None unsets the variable."""
    full = {k: v for k, v in os.environ.items() if not k.startswith(("REPARAM_", "TRITON_"))}
    full.update({k: v for k, v in env.items() if v is not None})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, timeout=timeout)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


SAMPLE = "import torch, reparam_kernels as rk; z = rk.randn(4, seed=7); print(rk.backend_for(z), z[2].item())"


def test_cpu_is_the_default():
    assert python(SAMPLE).startswith("cpu 1.788757")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_an_instruction_set_can_be_forced(isa):
    from reparam_kernels import _C

    code = SAMPLE + "; from reparam_kernels import _C; print(_C.isa())"
    if isa in _C.available_isas():
        assert python(code, REPARAM_CPU_ISA=isa).split() == [*python(code).split()[:2], isa]
    else:
        assert "instruction set: must be one that this CPU and build have" in python(code, 1, REPARAM_CPU_ISA=isa)


def test_reference_can_be_forced():
    assert python(SAMPLE, REPARAM_BACKEND="reference").startswith("reference 1.78875")


def test_triton_can_be_forced_in_the_interpreter():
    assert python(SAMPLE, REPARAM_BACKEND="triton", TRITON_INTERPRET="1").startswith("triton 1.788757")


def test_a_forced_backend_that_cannot_take_a_tensor_is_an_error():
    assert (
        "RuntimeError: REPARAM_BACKEND=triton: every tensor must be one that this backend takes; got a tensor on cpu. "
        "Unset REPARAM_BACKEND, or set TRITON_INTERPRET=1 to run the Triton kernels on CPU tensors."
    ) in python(SAMPLE, 1, REPARAM_BACKEND="triton")


def test_an_unknown_backend_is_an_error():
    assert (
        "ValueError: REPARAM_BACKEND: must be one of cpu, triton, reference; got 'gpu'. Correct it, or unset it."
    ) in python(SAMPLE, 1, REPARAM_BACKEND="gpu")


def test_without_the_extension_the_reference_runs_and_says_why_once():
    code = "import sys; sys.modules['reparam_kernels._C'] = None; " + SAMPLE + "; rk.randn(3); rk.randn(3)"
    out = python(code)
    assert out.startswith("reference 1.78875")
    assert out.count("UserWarning: reparam_kernels: runs in plain torch on cpu, slower: ") == 1


def test_gradients_flow_in_the_reference_backend():
    code = (
        "import torch, reparam_kernels as rk; m = torch.ones(3, 2, requires_grad=True); "
        "z, kl = rk.reparameterize_kl(m, torch.zeros(3, 2), seed=1); (z.sum() + kl.sum()).backward(); print(m.grad)"
    )
    assert "[2., 2.]" in python(code, REPARAM_BACKEND="reference")


def test_importing_the_package_does_not_import_triton():
    assert python("import sys, reparam_kernels; print('triton' in sys.modules)").strip() == "False"


def test_report_names_versions_backends_and_instruction_set():
    out = subprocess.run([sys.executable, "-m", "reparam_kernels"], capture_output=True, text=True, check=True).stdout
    for word in ("noise version 1", "torch", "triton", "cpu backend", "C++, ", "REPARAM_BACKEND"):
        assert word in out


def test_report_says_why_an_instruction_set_runs():
    for forced, why in ((None, "the best that this CPU has"), ("baseline", "baseline: forced by REPARAM_CPU_ISA")):
        assert why in python("import reparam_kernels.__main__ as m; m.report()", REPARAM_CPU_ISA=forced)


def test_a_forked_child_samples_without_hanging():
    """OpenMP's threads do not survive a fork, and the child must not wait for them."""
    code = """
import os, torch, reparam_kernels as rk
torch.set_num_threads(2)
z = rk.randn(1 << 20, seed=3)
expected = z.numpy().tobytes()
child = os.fork()
if child == 0:  # torch's own parallel ops would hang here, so none of them
    os._exit(0 if rk.randn(1 << 20, seed=3).numpy().tobytes() == expected else 1)
print(os.waitpid(child, 0)[1])
"""
    assert python("import warnings; warnings.simplefilter('ignore')\n" + code).strip() == "0"


def test_data_loader_workers_sample():
    """The parent has used its threads before it forks two workers; each item has the noise of its seed."""
    code = """
import torch, reparam_kernels as rk
from torch.utils.data import DataLoader
torch.set_num_threads(2)
rk.randn(1 << 20, seed=3)

class Noise(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return rk.randn(1 << 16, seed=i)

items = torch.cat(list(DataLoader(Noise(), batch_size=2, num_workers=2)))
print(all(item.equal(rk.randn(1 << 16, seed=i)) for i, item in enumerate(items)))
"""
    assert python(code).strip() == "True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_belong_to_torch_and_its_count_is_respected():
    """The process has one OpenMP runtime, and a Python thread that asks torch for one thread gets no others."""
    code = """
import os, threading, time, torch, reparam_kernels as rk
from reparam_kernels import _C
def team():  # a thread that was joined may still be listed for a moment
    return min(len(os.listdir("/proc/self/task")) for _ in range(100) if time.sleep(0.001) is None)
torch.set_num_threads(1)
rk.randn(1 << 20, seed=3)
alone = team()
def one():
    torch.set_num_threads(1)
    before = team()
    rk.randn(1 << 20, seed=3)
    print(team() - before)
t = threading.Thread(target=one); t.start(); t.join()
torch.set_num_threads(2)
rk.randn(1 << 20, seed=3)
print(team() - alone)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}))
"""
    assert python(code).split() == ["0", "1", "1"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["reparam_kernels", "selftest", "--device", "hip"], "must be a device that torch can use here; got 'hip': "),
        (["bench", "no_part"], "PART: must be one of main, small, "),
    ],
)
def test_a_wrong_option_of_a_command_is_no_traceback(command, says):
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_triton_does_not_take_runs_in_plain_torch_and_says_why(monkeypatch):
    """torch is asked about the GPU; a stub answers for one of compute capability 6.1."""
    from reparam_kernels.core import backends

    monkeypatch.setattr(backends, "FORCED", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Old GPU")
    backends.backend_name.cache_clear()
    with pytest.warns(UserWarning, match="on cuda, slower: Old GPU has compute capability 6.1, and Triton needs 7.0"):
        assert backends.backend_name("cuda") == "reference"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    backends.backend_name.cache_clear()
    assert backends.backend_name("cuda") == "triton"
    backends.backend_name.cache_clear()
    from reparam_kernels.__main__ import triton_line

    assert triton_line() == "on Old GPU, compute capability 9.0"


@pytest.mark.parametrize(
    ("architecture", "taken"),
    [
        ("gfx803", False),
        ("gfx900", False),
        ("gfx1010:xnack-", False),
        ("gfx1030", False),
        ("gfx940", False),
        ("gfx906", True),
    ]
    + [(name, True) for name in ("gfx908", "gfx90a:sramecc+:xnack-", "gfx942", "gfx950", "gfx1100", "gfx1201")],
)
def test_an_amd_gpu_that_triton_does_not_compile_for_runs_in_plain_torch(monkeypatch, architecture, taken):
    """Triton 3.9 compiled the kernels for those that are taken, and failed for the others."""
    from reparam_kernels.core import backends

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", "7.0")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: SimpleNamespace(gcnArchName=architecture))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A GPU")
    takes = "gfx906, gfx908, gfx90a, gfx942, gfx950, and from gfx11 on"
    says = f"A GPU has architecture {architecture}, and Triton compiles for {takes}"
    assert backends.too_old("cuda") == (None if taken else says)
