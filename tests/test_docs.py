"""Every example in a docstring, the README or docs/ runs and prints what it says."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import reparam_kernels as rk
from tests import versions

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def public(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, ModuleType) and thing is not rk.reference:
            yield from public(thing)
        elif callable(thing):
            yield thing


PUBLIC = list(public(rk))


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: f"{t.__module__}.{t.__name__}")
def test_docstring_has_its_parts_and_its_example_runs(thing):
    text = thing.__doc__
    for part in ("Args:", "Raises:", "Example:"):
        assert part in text
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs={})
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).attempted > 0
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_of_a_page_run_in_order(page):
    """A comment `# -> text` at the end of a print's line is what it prints."""
    space: dict = {}
    for block in blocks(page):
        printed = []
        space["print"] = lambda *values, printed=printed: printed.append(" ".join(map(str, values)))
        exec(compile(block, page.name, "exec"), space)
        assert printed == re.findall(r"# -> (.*)", block)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_tests_that_exist(page):
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_files_that_exist(page):
    """A path in backticks, from the repository's root, the package or csrc."""
    for name in re.findall(r"`(\w+/[\w/]*(?:\.\w+)?)(?:::\w+)?`", page.read_text()):
        assert any((ROOT / base / name).exists() for base in ("", "reparam_kernels", "csrc")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pictures_and_relative_links_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_api_page_is_the_docstrings():
    done = subprocess.run(
        [sys.executable, ROOT / "docs/api.py", "--check"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0


def test_the_table_of_versions_is_the_committed_results():
    page = versions.PAGE.read_text()
    assert versions.written(page, versions.committed()) == page
