"""`python -m tests.versions 2.11.0` runs the suite on another torch and writes the table of docs/versions.md.

The environment is new, and is deleted afterwards. This module needs only the standard library, since it makes it.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/reports/versions.json"
PAGE = ROOT / "docs/versions.md"
HEAD = ("torch", "triton", "numpy", "Python", "passed", "failed", "skipped", "seconds", "kernels for sm_90", "commit")


def install(python, folder):
    """Install the pins, one torch and this package as the Makefile does. Return the wheel of each package."""
    wheels = {}
    commands = (
        ["--require-hashes", "-r", "requirements.txt"],
        [f"torch=={folder.name.removeprefix('torch-')}"],
        ["--no-deps", "--no-build-isolation", "-e", "."],
    )
    for command in commands:
        report = folder / "report.json"
        pip = [python, "-m", "pip", "install", *shlex.split(os.environ.get("PIP_ARGS", "")), "--report", report]
        subprocess.run([*pip, *command], cwd=ROOT, check=True)
        for item in json.loads(report.read_text())["install"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            wheels[name] = Path(unquote(urlparse(item["download_info"]["url"]).path)).name
    return wheels


def run_suite(python, folder, options):
    """Run the suite. Return its counts, and the name and the error of each test that failed."""
    report = folder / "junit.xml"
    begin = time.monotonic()
    subprocess.run([python, "-m", "pytest", f"--junitxml={report}", *options], cwd=ROOT)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failures = {
        f"{case.get('classname')}.{case.get('name')}": (problem.get("message") or "no message").splitlines()[0][:200]
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = int(suite.get("skipped"))
    return {
        "passed": int(suite.get("tests")) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "seconds": round(time.monotonic() - begin),
        "failures": failures,
    }


def compile_kernels(python):
    """Compile every variant of the kernels for sm_90. Return what is to be told about them."""
    command = [python, "-m", "tests.gpu_variants", "every", "sm_90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"not compiled: {done.stderr.strip().splitlines()[-1]}"
    counts = json.loads(done.stdout)
    per_element = {c["kernel"]: c["instructions"] for c in counts if c["variant"] == "latent float32"}
    spilling = sum(c["spills"] > 0 for c in counts)
    return (
        f"{len(counts)} compiled, {spilling} with spills; {per_element['forward_kernel']:.1f} and "
        f"{per_element['backward_kernel']:.1f} instructions an element"
    )


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def committed():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def table(results):
    """Format one row per run, then what failed and the wheels of each run."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for r in results:
        lines.append(f"| {' | '.join(str(r[name]) for name in HEAD)} |")
    for r in results:
        lines += ["", f"torch {r['torch']} on Python {r['Python']}:", ""]
        lines += [f"- failed: `{test}`: {error}" for test, error in r["failures"].items()]
        wheels = "<br>".join(r["wheels"])
        lines += ["", f"<details><summary>the {len(r['wheels'])} wheels</summary>{wheels}</details>"]
    return "\n".join(lines) + "\n"


def written(page, results):
    """Return the page with its table replaced between the marks."""
    mark = re.compile(r"(<!-- versions -->\n).*?(<!-- end -->\n)", flags=re.S)
    return mark.sub(lambda m: m[1] + table(results) + m[2], page)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("torch")
    args, options = parser.parse_known_args()
    folder = ROOT / "out" / f"torch-{args.torch}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        measured = commit()
        wheels = install(python, folder)
        result = run_suite(python, folder, options) | {"kernels for sm_90": compile_kernels(python)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {name: wheels[name].split("-")[1] for name in ("torch", "triton", "numpy")}
    result |= {"Python": platform.python_version(), "commit": measured}
    brought = sorted(name for name in wheels if name in ("torch", "numpy") or re.match("triton|nvidia|cuda", name))
    result["wheels"] = [wheels[name] for name in brought]
    same = ("torch", "Python")
    results = [r for r in committed() if any(r[name] != result[name] for name in same)] + [result]
    results.sort(key=lambda r: [int(part) for part in re.findall(r"\d+", f"{r['torch'].split('+')[0]}.{r['Python']}")])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), results))
    sys.exit(result["failed"] > 0)


if __name__ == "__main__":
    main()
