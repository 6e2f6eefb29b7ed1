"""A call on DTensors gives what it gives on one process. The checks are those of tests/distributed_driver.py."""

import subprocess
import sys
import time

import pytest

from tests import distributed_driver


def run(tmp_path, world):
    """Run the driver in each process. If one fails, the others would wait for it."""
    command = [sys.executable, "-m", "tests.distributed_driver"]
    runs = []
    for rank in range(world):
        with open(tmp_path / str(rank), "w") as file:
            given = [*command, str(rank), str(world), str(tmp_path / "store")]
            runs.append(subprocess.Popen(given, stdout=file, stderr=file))
    end = time.monotonic() + 240
    try:
        while any(run.poll() is None for run in runs) and not any(run.poll() for run in runs):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    outputs = [(tmp_path / str(rank)).read_text() for rank in range(world)]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
    checks = sum(name.startswith("check_") for name in vars(distributed_driver))
    assert outputs[0].count("check_") == checks * (1 + (world == 4))  # meshes


def test_dtensors_on_two_processes(tmp_path):
    run(tmp_path, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 4])
def test_dtensors_on_one_process_and_on_a_mesh_of_two_by_two(tmp_path, world):
    run(tmp_path, world)
