"""A call on DTensors gives what it gives on one process. The checks are those of tests/distributed_driver.py."""

import subprocess
import sys

import pytest

from tests import distributed_driver


def run(tmp_path, world):
    command = [sys.executable, "-m", "tests.distributed_driver"]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
    meshes = 1 + (world == 4)
    checks = sum(name.startswith("check_") for name in vars(distributed_driver))
    assert outputs[0].count("check_") == meshes * checks


def test_dtensors_on_two_processes(tmp_path):
    run(tmp_path, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 4])
def test_dtensors_on_one_process_and_on_a_mesh_of_two_by_two(tmp_path, world):
    run(tmp_path, world)
