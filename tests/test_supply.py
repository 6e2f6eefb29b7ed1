"""The wheel and the sdist, the pinned dependencies, and files that must not run code."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import reparam_kernels as rk
from tests.test_backends import python

ROOT = Path(__file__).parent.parent
EXTENSION = "reparam_kernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")
# A Python audit hook refuses every socket, also those that C code opens through Python.
OFFLINE = """
import sys

def refuse(event, args):
    if event.startswith("socket."):
        raise RuntimeError("network: " + event)

sys.addaudithook(refuse)
"""


def pyproject():
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---- the wheel and the sdist


def test_every_subpackage_and_data_file_is_in_the_wheel():
    table = pyproject()["tool"]["setuptools"]
    package = ROOT / "reparam_kernels"
    folders = {path.parent.relative_to(ROOT) for path in package.rglob("*.py")}
    assert sorted(table["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    others = {".py", ".pyc", ".so", ".pyd"}
    data = {path.name for path in package.rglob("*") if path.is_file() and path.suffix not in others}
    assert set(table["package-data"]["reparam_kernels"]) == data == {"py.typed", "_C.pyi"}


class Built:
    """Builds the sdist and the wheel from only the tracked files, and the wheel of the unpacked sdist."""

    def __init__(self, folder):
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        self.tracked = {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}
        self.tree = folder / "tree"
        for name in self.tracked:
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        self.name = f"reparam_kernels-{rk.__version__}"
        self.sdist = self.build("sdist", self.tree, folder)
        self.wheel = self.build("wheel", self.tree, folder)
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder, filter="data")
        self.again = self.build("wheel", folder / self.name, folder / "again")

    def build(self, kind, source, target):
        code = f"{OFFLINE}\nfrom setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
        (made,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
        return made

    def files(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            assert len(archive.namelist()) == len(set(archive.namelist()))
            return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("git tells which files there are")
    return Built(tmp_path_factory.mktemp("built"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built, record_property):
    files = built.files(built.wheel)
    info = {f"{built.name}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")}
    package = {name for name in built.tracked if name.startswith("reparam_kernels/")}
    assert set(files) == package | {EXTENSION, f"{built.name}.dist-info/licenses/LICENSE"} | info
    assert all(files[name] == (ROOT / name).read_bytes() for name in package)
    record_property("wheel", f"{built.wheel.stat().st_size / 2**20:.2f} MiB")
    rows = [f"| `{name}` | {len(files[name])} |" for name in sorted(files)]
    record_property("table", "\n".join(["| file in the wheel | bytes |", "|---|---|", *rows]))


@pytest.mark.slow
def test_the_wheel_says_what_pyproject_says(built):
    files, project = built.files(built.wheel), pyproject()["project"]
    metadata = Metadata.from_email(files[f"{built.name}.dist-info/METADATA"])
    wanted = {str(Requirement(r)) for r in project["dependencies"]}
    for extra, requirements in project["optional-dependencies"].items():
        for r in map(Requirement, requirements):
            join = " and" if r.marker else ";"
            wanted.add(str(Requirement(f'{r}{join} extra == "{extra}"')))
    assert {str(r) for r in metadata.requires_dist} == wanted
    assert metadata.requires_python == project["requires-python"]
    assert metadata.version == Version(rk.__version__)
    assert metadata.license_expression == project["license"] == "BSD-3-Clause"
    assert files[f"{built.name}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"Root-Is-Purelib: false" in files[f"{built.name}.dist-info/WHEEL"]


@pytest.mark.slow
def test_the_record_hashes_each_file(built):
    files = built.files(built.wheel)
    record = f"{built.name}.dist-info/RECORD"
    lines = files.pop(record).decode().split()
    wanted = [f"{record},,"]
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        wanted.append(f"{name},sha256={digest},{len(data)}")
    assert sorted(lines) == sorted(wanted)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf lists what a library asks for")
def test_the_extension_needs_only_system_libraries(built, tmp_path):
    (tmp_path / "_C.so").write_bytes(built.files(built.wheel)[EXTENSION])
    done = subprocess.run(
        ["readelf", "-dW", tmp_path / "_C.so"], check=True, capture_output=True, text=True, env={"LC_ALL": "C"}
    )
    assert "RPATH" not in done.stdout
    assert "RUNPATH" not in done.stdout
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)}
    system = {"libstdc++", "libgomp", "libm", "libgcc_s", "libc", "libpthread"}
    assert {"libstdc++", "libc"} <= needed <= system | {name for name in needed if name.startswith("ld-linux")}


@pytest.mark.slow
def test_the_extension_names_no_folder_of_its_builder(built):
    data = built.files(built.wheel)[EXTENSION]
    assert [path for path in re.findall(rb"\0(/[\w.+ -]+(?:/[\w.+ -]*)+)(?=\0)", data) if len(path) > 7] == []
    for folder in (built.tree.parent, ROOT, sys.prefix, Path.home()):
        assert str(folder).encode() not in data


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_and_the_tests_need(built):
    with tarfile.open(built.sdist) as archive:
        names = {member.name.removeprefix(f"{built.name}/") for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    made |= {f"reparam_kernels.egg-info/{name}" for name in ("PKG-INFO", "SOURCES.txt", "dependency_links.txt")}
    made |= {f"reparam_kernels.egg-info/{name}" for name in ("requires.txt", "top_level.txt")}
    assert names == {name for name in built.tracked if not name.startswith(".")} | made


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_the_same(built):
    """The wheels are equal to the byte, so they do not depend on the folder either."""
    wheel, again = built.files(built.wheel), built.files(built.again)
    assert set(wheel) == set(again)
    assert [name for name in wheel if wheel[name] != again[name]] == []


# ---- the pins


def pins():
    """Return each entry of requirements.txt with its hashes."""
    for line in (ROOT / "requirements.txt").read_text().replace("\\\n", "").splitlines():
        if line and not line.startswith(("#", "--only-binary :all:")):
            text, *hashes = line.split("--hash=")
            yield Requirement(text), [h.strip() for h in hashes]


def pinned(requirement, environment):
    """Return the one version that requirements.txt pins for a requirement in an environment."""
    versions = [
        pin.specifier
        for pin, _ in pins()
        if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    assert len(versions) == 1, f"{requirement}: {versions or 'no pin'}; run make pins"
    (specifier,) = versions[0]
    return Version(specifier.version)


def test_every_pin_is_one_version_with_its_hashes_and_no_address():
    entries = list(pins())
    assert len(entries) > 30
    for pin, hashes in entries:
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert "*" not in str(pin.specifier), pin
        assert pin.url is None, pin
        assert hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), pin


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_what_pyproject_asks_for_is_pinned(system, version):
    environment = default_environment() | {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "platform_system": system,
        "sys_platform": {"Windows": "win32"}.get(system, system.lower()),
        "os_name": "nt" if system == "Windows" else "posix",
    }
    table = pyproject()
    extras = table["project"]["optional-dependencies"]
    asked = [
        *table["build-system"]["requires"],
        *table["project"]["dependencies"],
        *extras["test"],
        *extras["examples"],
    ]
    names = set()
    for requirement in map(Requirement, asked):
        applies = requirement.marker is None or requirement.marker.evaluate(environment)
        if applies and requirement.name != "torch":
            assert pinned(requirement, environment) in requirement.specifier, requirement
            names.add(requirement.name)
    assert {"numpy", "pytest", "setuptools", "pybind11"} <= names
    assert ("triton" in names) == (system == "Linux")


def test_triton_is_asked_for_by_the_tests_and_not_by_an_installation():
    """A build of torch for a GPU brings its own triton, which another one would replace."""
    project = pyproject()["project"]
    names = {extra: {Requirement(r).name for r in rs} for extra, rs in project["optional-dependencies"].items()}
    assert {Requirement(r).name for r in project["dependencies"]} == {"torch"}
    assert {extra for extra, asked in names.items() if "triton" in asked} == {
        "triton", "test", "integrations", "integrations-old"
    }  # fmt: skip


def test_what_every_build_of_torch_asks_for_is_pinned():
    """The other requirements of the CUDA build have markers."""
    asked = [r for r in map(Requirement, importlib.metadata.requires("torch")) if r.marker is None]
    assert len(asked) > 4
    for requirement in asked:
        assert pinned(requirement, default_environment()) in requirement.specifier, requirement


@pytest.mark.skipif(not shutil.which("make"), reason="reads the Makefile by make")
def test_make_installs_the_pins_and_one_torch():
    done = subprocess.run(
        ["make", "-n", "VENV=out/none", "PIP_ARGS=", "out/none/.ready"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    pips = [line.split(" pip install ")[1].split() for line in done.stdout.splitlines() if " pip install " in line]
    (torch_pin,) = pips.pop(1)
    assert pips == [["--require-hashes", "-r", "requirements.txt"], ["--no-deps", "--no-build-isolation", "-e", "."]]
    (version,) = Requirement(torch_pin.strip("'")).specifier
    (asked,) = (r for r in map(Requirement, pyproject()["project"]["dependencies"]) if r.name == "torch")
    assert version.operator == "=="
    assert Version(version.version) in asked.specifier


# ---- files that run no code, and no network


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    from examples.vae.training import Options, restore

    torch.save({"options": Evil(tmp_path / "ran")}, tmp_path / "c.pt")
    with pytest.raises(pickle.UnpicklingError):
        restore(tmp_path / "c.pt", None, None, Options())
    assert not (tmp_path / "ran").exists()


def test_images_that_run_code_are_refused(tmp_path):
    from examples.vae.data import load

    np.savez(tmp_path / "x.npz", x=np.array([Evil(tmp_path / "ran")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


def test_nothing_asks_the_network(tmp_path):
    code = f"""{OFFLINE}
import socket
try:
    socket.socket()
except RuntimeError:
    print("refused")
import torch, examples.why_reparameterize
from pathlib import Path
from examples.vae.data import load
from examples.vae.training import Options, train
import reparam_kernels as rk
checkpoint = Path({str(tmp_path / "c.pt")!r})
for epochs in (1, 2):
    train(load(), Options(epochs=epochs, hidden=8), checkpoint, resume=epochs > 1, quiet=True)
print(rk.backend_for(torch.zeros(1)))
"""
    assert python(code, OMP_NUM_THREADS="1").split() == ["refused", "cpu"]
