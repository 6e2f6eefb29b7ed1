# Everything a user or a contributor runs. `make demo` and `make test` need only Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RUN = $(VENV)/bin/python
DEMO_ARGS ?= --impl both --epochs 150

.PHONY: demo parity test test-slow test-gpu-code lint clean

demo: $(VENV)/.ready
	$(RUN) -m examples.vae $(DEMO_ARGS) --out out/vae

parity: $(VENV)/.ready
	$(RUN) -m examples.vae.parity

test: $(VENV)/.ready
	$(RUN) -m pytest

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

test-gpu-code: $(VENV)/.ready
	$(RUN) -m pytest tests/test_gpu_code.py -m 'gpu_code or not gpu_code'

lint: $(VENV)/.ready
	$(RUN) -m pip install -q $(PIP_ARGS) -e '.[lint]'
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

clean:
	rm -rf build dist out $(VENV) *.egg-info reparam_kernels/_C*.so

# The tests pin torch; where pip brings its CUDA build, that build brings its own triton.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_ARGS) 'torch==2.13.0'
	$(RUN) -m pip install $(PIP_ARGS) -e '.[test,examples]'
	touch $@
