"""What a planned launch hands to the CUDA driver, whose place a stub takes: the checks of tests/gpu_plans.py."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

CHECKS = re.findall(r"^def (check_\w+)", Path(__file__).with_name("gpu_plans.py").read_text(), re.M)


@cache
def errors():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.gpu_plans"], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        return dict.fromkeys(CHECKS, f"exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_at_the_driver(check):
    error = errors()[check]
    assert error is None, error
