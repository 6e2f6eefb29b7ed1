# The commands of users and contributors. `make demo` and `make test` need only Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RUN = $(VENV)/bin/python
DEMO_ARGS ?= --impl both --epochs 150
WHY_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?= -n auto --dist worksteal

.PHONY: demo parity why test test-slow test-arm test-gpu-code test-distributed test-integrations test-torch \
	quality sanitize fuzz extremes determinism faults scale supply bench results lint sizes pins clean

demo: $(VENV)/.ready
	$(RUN) -m examples.vae $(DEMO_ARGS) --out out/vae

parity: $(VENV)/.ready
	$(RUN) -m examples.vae.parity

why: $(VENV)/.ready
	$(RUN) -m examples.why_reparameterize $(WHY_ARGS)

test: $(VENV)/.ready
	$(RUN) -m pytest $(TEST_ARGS)

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

# Debian: apt install g++-aarch64-linux-gnu qemu-user
test-arm: $(VENV)/.ready
	$(RUN) -m pytest -m arm

# The adapters beside an old and the newest release of the packages that they adapt, each in a separate environment, in
# which warnings are not errors.
test-integrations: $(VENV)-integrations/.ready $(VENV)-integrations-old/.ready
	$(VENV)-integrations/bin/python -m pytest -m integrations -o filterwarnings=default tests/integrations
	$(VENV)-integrations-old/bin/python -m pytest -m integrations -o filterwarnings=default tests/integrations

# The suite with another torch, in an environment that is deleted afterwards: make test-torch TORCH=2.11.0 PYTHON=python3.12
# A CUDA build takes 5 GB of disk while it runs. Its row of docs/versions.md is written.
test-torch:
	@test -n '$(TORCH)' || { echo 'make test-torch: say which torch, as in TORCH=2.11.0'; exit 2; }
	PIP_ARGS='$(PIP_ARGS)' $(PYTHON) -m tests.versions $(TORCH) $(TEST_ARGS)

# DTensors and data parallelism with four processes; make test has two.
test-distributed: $(VENV)/.ready
	$(RUN) -m pytest -m 'distributed or not distributed' tests/test_distributed.py tests/test_vae.py

test-gpu-code: $(VENV)/.ready
	$(RUN) -m pytest tests/test_gpu_code.py -m 'gpu_code or not gpu_code'

# Takes minutes. A shorter run: make quality QUALITY_ARGS='--bits 24 --samples 1'. Debian: apt install dieharder
quality: $(VENV)/.ready
	$(RUN) -m tests.quality $(or $(QUALITY_ARGS),--out tests/reports/quality.md)

# 20 minutes. Debian: apt install valgrind clang; the report names the tools that are not installed.
sanitize: $(VENV)/.ready
	$(RUN) -m tests.sanitize
	$(RUN) -m pytest -m 'slow or not slow' tests/test_hostile.py \
		--report=tests/reports/hostile.md --report-title='Hostile calls'

# 50,000 examples of the CPU kernels, 7,500 of Triton's in the interpreter, 12,500 of the noise. Takes most of an hour.
FUZZ_SEED ?= 2026
fuzz: $(VENV)/.ready
	FUZZ_DEPTH=125 $(RUN) -m pytest tests/test_properties.py --hypothesis-seed=$(FUZZ_SEED) \
		--report=tests/reports/fuzz.md --report-title='Any call against the formula'

extremes: $(VENV)/.ready
	$(RUN) -m pytest tests/test_extremes.py --report=tests/reports/extremes.md --report-title='Extreme values'

# Minutes.
determinism: $(VENV)/.ready
	$(RUN) -m pytest -m 'slow or not slow' tests/test_determinism.py \
		--report=tests/reports/determinism.md --report-title='The same bits: every way to the same result'

# Minutes.
faults: $(VENV)/.ready
	$(RUN) -m pytest -m 'not arm' tests/test_faults.py tests/test_forks.py tests/test_installs.py tests/test_endurance.py \
		--report=tests/reports/faults.md --report-title='Faults'

# Takes up to 18 GB of memory; a test that finds less is skipped.
scale: $(VENV)/.ready
	$(RUN) -m pytest -m slow tests/test_scale.py --report=tests/reports/scale.md --report-title='Scale'

# Checks the wheel and the sdist, the pins, and the files that must not run code.
supply: $(VENV)/.ready
	$(RUN) -m pytest -m 'slow or not slow' tests/test_supply.py --report=tests/reports/supply.md --report-title='Supply'

lint: $(VENV)/.ready
	$(RUN) -m pip install -q $(PIP_ARGS) --no-build-isolation -e '.[lint]'
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*/*

# The lines that each file has gained since a commit, and those of product, tests, docs and the rest together:
# make sizes BASE=main. Against the empty tree, these are the sizes: make sizes BASE=$$(git hash-object -t tree /dev/null)
BASE ?= HEAD
sizes:
	@git diff --numstat --no-renames $(BASE) -- | awk '{ \
		part = $$3 ~ /^(reparam_kernels|csrc)/ ? "product" : $$3 ~ /^tests/ ? "tests" : $$3 ~ /\.md$$/ ? "docs" : "other"; \
		sum[part] += $$1 - $$2; \
		printf "%-8s %+7d  %s\n", part, $$1 - $$2, $$3 } \
		END { for (part in sum) printf "%-8s %+7d  ~ together\n", part, sum[part] }' | LC_ALL=C sort -k 1,1 -k 3

bench: $(VENV)/.ready
	$(RUN) -m reparam_kernels bench $(BENCH_ARGS)

# Every committed result again, and the tables of README and docs. An hour; parts of at most 8 minutes each:
# make results PARTS='main small'. Their names and minutes: python -m bench --list
results: $(VENV)/.ready
	$(RUN) -m bench $(PARTS)

# Pins the newest versions for every Python and platform. Torch is excluded, since its CUDA build requires gigabytes;
# TORCH_NEEDS lists what all of its builds require.
TORCH_NEEDS = filelock fsspec jinja2 networkx sympy typing-extensions
pins:
	$(PYTHON) -m venv out/pins
	out/pins/bin/python -m pip install -q $(PIP_ARGS) uv==0.13.9
	echo torch > out/pins/torch
	printf '%s\n' $(TORCH_NEEDS) | UV_CUSTOM_COMPILE_COMMAND='make pins' out/pins/bin/uv pip compile -q --upgrade \
		--universal --python-version 3.10 --generate-hashes --only-binary :all: --emit-build-options --no-annotate \
		--extra test --extra examples --excludes out/pins/torch pyproject.toml - -o requirements.txt

clean:
	rm -rf build dist out $(VENV) $(VENV)-integrations $(VENV)-integrations-old *.egg-info reparam_kernels/_C*.so

# All are pinned by hash except torch, whose build depends on the index. A CUDA build replaces triton with its own.
$(VENV)/.ready: pyproject.toml setup.py requirements.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_ARGS) --require-hashes -r requirements.txt
	$(RUN) -m pip install $(PIP_ARGS) 'torch==2.13.0'
	$(RUN) -m pip install $(PIP_ARGS) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)-integrations/.ready $(VENV)-integrations-old/.ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(PIP_ARGS) 'torch==2.13.0'
	$(@D)/bin/python -m pip install $(PIP_ARGS) -e '.[$(patsubst $(VENV)-%,%,$(@D))]'
	touch $@
