# make demo   two videos of one prompt, dense and sparse, side by side
# make test   the test suite; where triton is, its kernels in the interpreter and the compile gate
# make test-slow   the slow tests that it leaves out
# make gates  the compile gate for more GPUs, and with the oldest Triton that the kernels are for
# make check  lint, format, types
# make docs   the site in site/, strict: every link and anchor is there
# make bench  the CPU bench
# make check-diffusers  the tests of families on the lowest release of diffusers that is allowed, and on the newest
# make mutate MUTANTS="vidsparse.plan*"  which of the faults planted there no test notices; hours for all
# Each sets up what it needs in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

TRITON_OLDEST := 3.6.0
TRITON_FOLDER ?= .venv/triton-$(TRITON_OLDEST)
MUTANTS ?=

.PHONY: demo test test-slow gates docs check check-diffusers bench mutate
.DEFAULT_GOAL := demo

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vidsparse needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,train]"
	touch $@

demo: .venv/.installed
	$(BIN)/vidsparse generate --compare-dense --out outputs/demo

# Two workers of one thread each: two of two take each other's cores, and small tensors gain nothing.
test: export OMP_NUM_THREADS = 1
test: .venv/.installed
	$(BIN)/python -m pytest -n 2
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	    set -x; TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "interp and not slow" && \
	    $(BIN)/python kernels/aot/gate.py; \
	else \
	    echo "skipped: the Triton kernels in the interpreter and the compile gate; triton is not installed (it exists for Linux)"; \
	fi

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m "slow and not interp"
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	    set -x; TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "slow and interp"; \
	fi

gates: .venv/.installed
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	    set -ex; $(BIN)/python kernels/aot/gate.py --arch 86,89,120,gfx942; \
	    if test -e $(TRITON_FOLDER)/triton || $(BIN)/pip install --quiet --disable-pip-version-check \
	        --no-deps --target $(TRITON_FOLDER) triton==$(TRITON_OLDEST); then \
	        PYTHONPATH=$(TRITON_FOLDER) $(BIN)/python kernels/aot/gate.py; \
	    else echo "skipped: the compile gate with triton $(TRITON_OLDEST); pip cannot fetch it"; fi; \
	else echo "skipped: the compile gate; triton is not installed (it exists for Linux)"; fi

# In an environment of its own: what builds the site is not what runs the package.
.venv/docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/pip install --quiet --disable-pip-version-check \
	    "$$($(PYTHON) -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"][0])')"
	touch $@

docs: .venv/.installed .venv/docs/.installed
	$(BIN)/python pipelines/methods_page.py --check
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-diffusers: .venv/.installed
	$(BIN)/python tests/check_diffusers.py

bench: .venv/.installed
	$(BIN)/python kernels/bench/cpu.py

# One thread: workers are forked, and threads do not survive that.
mutate: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[mutate]"
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results | sed '/: not checked$$/d'
