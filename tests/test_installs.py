"""Installations with a missing, old or broken part give one warning or a clear error, and the rest runs."""

import ctypes
import importlib
import importlib.machinery
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from packaging.requirements import Requirement
from packaging.version import Version

import reparam_kernels as rk
from reparam_kernels import core
from reparam_kernels.core import backends
from tests.cases import linux
from tests.conftest import forget
from tests.test_backends import SAMPLE, python
from tests.test_builds import copied
from tests.test_faults import whole

ROOT = Path(__file__).parent.parent


def other_version():
    """Make a capsule like torch's, of an unknown DLPack version."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    other_version.memory = (ctypes.c_uint32 * 64)(99)
    return new(ctypes.addressof(other_version.memory), b"dlpack_exchange_api", None)


@pytest.mark.parametrize(
    ("api", "why"),
    [(None, "no attribute '__dlpack_c_exchange_api__'"), (object(), "PyCapsule"), (other_version, "unknown DLPack")],
    ids=["absent", "foreign", "version"],
)
def test_a_torch_without_the_exchange_api(monkeypatch, api, why):
    """torch 2.9 has none: there is one warning that names the torch version, and the reference runs."""
    if api is None:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    else:
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", api() if callable(api) else api)
    monkeypatch.delitem(sys.modules, "reparam_kernels.core.cpu", raising=False)
    monkeypatch.delattr(core, "cpu", raising=False)
    forget()
    try:
        with pytest.raises(ImportError, match=r"torch \S+ does not provide the DLPack exchange API"):
            importlib.import_module("reparam_kernels.core.cpu")
        with pytest.warns(UserWarning, match=f"runs in plain torch on cpu, slower: .*{why}") as seen:
            whole()
        assert len(seen) == 1
        assert rk.backend_for(torch.zeros(1)) == "reference"
    finally:
        monkeypatch.undo()
        forget()
    whole()
    assert rk.backend_for(torch.zeros(1)) == "cpu"


def another_module(folder, source):
    """Compile a shared library of a few lines of C."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    (folder / "other.c").write_text(source)
    subprocess.run([cc, "-shared", "-fPIC", folder / "other.c", "-o", folder / "other.so"], check=True)
    return (folder / "other.so").read_bytes()


BROKEN = {
    "absent": (lambda tmp, whole: None, "has no extension. Install the package again: `pip install -v` shows why"),
    "empty": (lambda tmp, whole: b"", "file too short"),
    "half a header": (lambda tmp, whole: whole[:50], "file too short"),
    "a header": (lambda tmp, whole: whole[:100], "is truncated"),
    "half": (lambda tmp, whole: whole[: len(whole) // 2], "is truncated"),
    "all but a byte": (lambda tmp, whole: whole[:-1], "is truncated"),
    "garbage": (lambda tmp, whole: b"garbage" * 1000, "invalid ELF header"),
    "another machine's": (lambda tmp, whole: whole[:18] + b"\xf3\0" + whole[20:], "cannot open shared object file"),
    "another library": (
        lambda tmp, whole: another_module(tmp, "int other;"),
        "does not define module export function",
    ),
    "another Python's": (
        lambda tmp, whole: another_module(tmp, "int gone(void); int PyInit__C(void) { return gone(); }"),
        "undefined symbol: gone",
    ),
}
QUICK = ("absent", "half", "another Python's")


@linux
@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w not in QUICK)) for w in BROKEN])
def test_a_broken_extension(tmp_path, what):
    """There is one warning that says what is wrong, and the reference runs; forcing the CPU kernels is an error."""
    from reparam_kernels import _C

    made, why = BROKEN[what]
    extension = Path(_C.__file__)
    shutil.copytree(ROOT / "reparam_kernels", tmp_path / "reparam_kernels", ignore=shutil.ignore_patterns("_C*.so"))
    content = made(tmp_path, extension.read_bytes())
    if content is not None:
        (tmp_path / "reparam_kernels" / extension.name).write_bytes(content)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
{SAMPLE}; rk.randn(3); print(rk.__file__)
"""
    out = python(code, LD_BIND_NOW="1")
    assert out.startswith("reference 1.78875")
    assert str(tmp_path / "reparam_kernels/__init__.py") in out
    assert out.count("Warning") == out.count("runs in plain torch on cpu, slower: ") == 1
    assert why in out.split("slower: ")[1].split("\n")[0]
    forced = python(code, 1, REPARAM_BACKEND="cpu")
    assert "RuntimeError: REPARAM_BACKEND=cpu: every tensor must be one that this backend takes; got" in forced
    assert why in forced.split("takes; got")[1]


HERE = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "{tree} is the source tree and has no extension. Build in place with `pip install -e .`."),
        (
            ("tree/_C.cpython-39-x86_64-linux-gnu.so",),
            "{tree} is the source tree and has no extension for this Python, but has _C.cpython-39-x86_64-linux-gnu.so."
            " Build in place with `pip install -e .`.",
        ),
        (
            (f"site/_C{HERE}",),
            "{tree} is the source tree and has no extension. It hides the installed package, {site}: start Python in "
            "another folder, or build in place with `pip install -e .`.",
        ),
    ],
    ids=["alone", "another Python's", "beside an installed package"],
)
def test_a_source_tree_without_its_extension(tmp_path, files, said):
    where = {name: tmp_path / name / "reparam_kernels" for name in ("tree", "site")}
    shutil.copytree(ROOT / "reparam_kernels", where["tree"], ignore=shutil.ignore_patterns("_C*.so"))
    (tmp_path / "tree/csrc").mkdir()
    where["site"].mkdir(parents=True)
    for name in files:
        where[name.split("/")[0]].joinpath(name.split("/")[1]).touch()
    code = f"""
import sys
from pathlib import Path
others = [p for p in sys.path if Path(p).resolve() != Path({str(ROOT)!r})]
sys.path[:] = [{str(tmp_path / "tree")!r}, {str(tmp_path / "site")!r}, *others]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
{SAMPLE}
"""
    out = python(code)
    assert out.startswith("reference 1.78875")
    assert out.split("slower: ")[1].split("\n")[0] == said.format(**where)


def test_a_torch_without_a_private_name_runs_the_reference_and_says_so():
    """With the kernels, a transform around a call would not be seen."""
    code = f"""
import torch
del torch._C._functorch.is_legacy_batchedtensor
{SAMPLE}
mu = torch.ones(3, 2)
f = lambda m: rk.kl_divergence(m, torch.zeros(3, 2)).sum()
items = mu.expand(4, 3, 2)
print(torch.equal(torch.func.grad(f)(mu), mu), torch.equal(torch.func.vmap(torch.func.grad(f))(items), items))
q = torch.distributions.Normal(mu, 1.0)
print(torch.equal(rk.distributions.Normal(mu, 1.0).log_prob(mu), q.log_prob(mu)))
"""
    out = python(code)
    assert out.startswith("reference 1.78875")
    assert "True True\nTrue" in out
    assert out.count("Warning") == out.count("does not say which transforms are around a call: ") == 1
    forced = python(code, 1, REPARAM_BACKEND="cpu")
    assert f"this backend takes; got torch {torch.__version__} does not say which transforms" in forced


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    forget()
    with pytest.warns(UserWarning, match=r"on cuda, slower: triton 3\.5\.1 is installed, and the kernels need 3\.6 or"):
        assert backends.backend_name("cuda") == "reference"
    forget()


def test_an_installation_changes_nothing_else(tmp_path):
    """pip's report lists what `pip install .` would install. Without an index it could replace nothing."""
    copied(tmp_path)
    options = ["--dry-run", "--quiet", "--report", "-", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *options, "."]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    made = {item["metadata"]["name"]: item["metadata"] for item in json.loads(done.stdout)["install"]}
    assert {name: data["version"] for name, data in made.items()} == {"reparam_kernels": rk.__version__}
    (needed,) = (Requirement(r) for r in made["reparam_kernels"]["requires_dist"] if "extra" not in r)
    assert needed.name == "torch"
    assert Version(torch.__version__) in needed.specifier


NO_TRITON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
sys.meta_path.insert(0, Refuse())
"""


def test_without_triton_the_cpu_runs_and_the_report_says_so():
    code = """
z, kl = rk.GaussianHead(3, 2)(torch.zeros(5, 3)); (z.sum() + kl.sum()).backward()
sys.argv = ["reparam_kernels"]
from reparam_kernels.__main__ import report; report()
"""
    out = python(NO_TRITON + SAMPLE + code)
    assert out.startswith("cpu 1.788757")
    assert "triton backend   missing: No module named 'triton'" in out
    forced = python(NO_TRITON + SAMPLE, 1, REPARAM_BACKEND="triton", TRITON_INTERPRET="1")
    assert "must be one that this backend takes; got No module named 'triton'" in forced


@pytest.mark.parametrize("asked", ["sse9", ""])
def test_an_unknown_instruction_set_is_an_error(asked):
    from reparam_kernels import _C

    has = ", ".join(_C.available_isas())
    assert (
        f"ValueError: instruction set: must be one that this CPU and build have ({has}); got '{asked}'. "
        "Correct or unset REPARAM_CPU_ISA."
    ) in python(SAMPLE, 1, REPARAM_CPU_ISA=asked)


@pytest.mark.arm
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "baseline"), ("SandyBridge", "baseline"), ("Haswell", "avx2")])
def test_the_extension_on_an_older_cpu(cpu, isa):
    """The extension alone, under an emulator: what it chooses, refuses and computes."""
    from reparam_kernels import _C

    assert shutil.which("qemu-x86_64"), "qemu-x86_64 must be installed (Debian: qemu-user)"
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("reparam_kernels._C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
try:
    _C.set_isa("avx512")
except ValueError as error:
    print(_C.isa(), str(error) == "isa", _C.test_eps(7, 5, 1000).hex())
"""
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [isa, "True", _C.test_eps(7, 5, 1000).hex()], done.stderr


@pytest.mark.slow
@linux
def test_triton_without_a_cache_folder_to_write_in(tmp_path):
    """Compile for a GPU that need not exist. A file in place of the cache folder stops even root from writing."""
    (tmp_path / "file").touch()
    code = f"""
import os, torch, reparam_kernels as rk
from bench.compiled import compiling

def launch():
    with compiling("sm_90") as launches:
        rk.randn(4096, seed=1)
    return len(launches)

try:
    launch()
except OSError as error:
    print("file/cache" in str(error))
print(rk.backend_for(torch.zeros(1)))
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path / "whole")!r}
print(launch())
"""
    out = python(code, TRITON_CACHE_DIR=str(tmp_path / "file/cache"))
    assert out.split() == ["True", "cpu", "1"]
    interpreted = python(
        SAMPLE, REPARAM_BACKEND="triton", TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path / "file/cache")
    )
    assert interpreted.startswith("triton 1.788757")
