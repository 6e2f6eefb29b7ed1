# Everything a user or a contributor runs. `make demo` and `make test` need only Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RUN = $(VENV)/bin/python
DEMO_ARGS ?= --impl both --epochs 150
WHY_ARGS ?=
BENCH_ARGS ?=

.PHONY: demo parity why test test-slow test-arm test-gpu-code test-integrations quality sanitize fuzz faults scale bench lint clean

demo: $(VENV)/.ready
	$(RUN) -m examples.vae $(DEMO_ARGS) --out out/vae

parity: $(VENV)/.ready
	$(RUN) -m examples.vae.parity

why: $(VENV)/.ready
	$(RUN) -m examples.why_reparameterize $(WHY_ARGS)

test: $(VENV)/.ready
	$(RUN) -m pytest

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

# Debian: apt install g++-aarch64-linux-gnu qemu-user
test-arm: $(VENV)/.ready
	$(RUN) -m pytest -m arm

# Beside the packages that the adapters are for, in an environment of its own; their warnings are theirs.
test-integrations: $(VENV)-integrations/.ready
	$(VENV)-integrations/bin/python -m pytest -m integrations -o filterwarnings=default tests/integrations

test-gpu-code: $(VENV)/.ready
	$(RUN) -m pytest tests/test_gpu_code.py -m 'gpu_code or not gpu_code'

# Minutes; a short form: make quality QUALITY_ARGS='--bits 24 --samples 1'. Debian: apt install dieharder
quality: $(VENV)/.ready
	$(RUN) -m tests.quality $(or $(QUALITY_ARGS),--out tests/reports/quality.md)

# Debian: apt install valgrind clang; what is not installed is left out, and the report says so.
sanitize: $(VENV)/.ready
	$(RUN) -m tests.sanitize
	$(RUN) -m pytest -m 'slow or not slow' tests/test_hostile.py

# 50,000 examples of the CPU kernels, 7,500 of Triton's in the interpreter, 12,500 of the noise.
FUZZ_SEED ?= 2026
fuzz: $(VENV)/.ready
	FUZZ_DEPTH=125 $(RUN) -m pytest tests/test_properties.py --hypothesis-seed=$(FUZZ_SEED)

# Minutes.
faults: $(VENV)/.ready
	$(RUN) -m pytest -m 'not arm' tests/test_faults.py --report=tests/reports/faults.md --report-title='Faults'

# Up to 18 GB of memory; a test that finds less free is skipped.
scale: $(VENV)/.ready
	$(RUN) -m pytest -m slow tests/test_scale.py --report=tests/reports/scale.md --report-title='Scale'

lint: $(VENV)/.ready
	$(RUN) -m pip install -q $(PIP_ARGS) -e '.[lint]'
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

bench: $(VENV)/.ready
	$(RUN) -m bench $(BENCH_ARGS)

clean:
	rm -rf build dist out $(VENV) $(VENV)-integrations *.egg-info reparam_kernels/_C*.so

# The tests pin torch; where pip brings its CUDA build, that build brings its own triton.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_ARGS) 'torch==2.13.0'
	$(RUN) -m pip install $(PIP_ARGS) -e '.[test,examples]'
	touch $@

$(VENV)-integrations/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install $(PIP_ARGS) 'torch==2.13.0'
	$(VENV)-integrations/bin/python -m pip install $(PIP_ARGS) -e '.[integrations]'
	touch $@
