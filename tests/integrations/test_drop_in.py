"""The blocks of docs/drop_in.md that import another package."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations

PAGE = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
BLOCKS = re.findall(r"```py\n(.*?)```", PAGE, flags=re.S)


def test_there_is_a_block_for_each_patch():
    patched = re.findall(r"rk\.integrations\.(\w+)\.patch\(\)", "".join(BLOCKS))
    assert set(patched) == {"diffusers", "pyro", "scvi"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split()[1])
def test_block_runs_and_prints_what_it_says(block):
    printed = []
    exec(compile(block, "drop_in.md", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert printed == re.findall(r"# -> (.*)", block)
