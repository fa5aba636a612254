# `make demo` and `make test` set up what they need in .venv the first time; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= $(CURDIR)/results/demo
WORKERS ?= 2
GPU_WORKERS ?= 8
export RAY_USAGE_STATS_ENABLED := 0

FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 0

.PHONY: help demo test test-quick test-gpu test-chaos fuzz lint format docs benchmark clean

help:
	@echo "make demo        search patterns on real text on a local Ray cluster, then write the report (under 4 minutes)"
	@echo "make test        run the CPU tests in two processes (make test WORKERS=4: in four)"
	@echo "make test-quick  the same without the tests that start Ray (a third of the time)"
	@echo "make test-gpu    run the tests that need a CUDA device, in eight processes"
	@echo "make fuzz        random calls against a float64 reference (make fuzz FUZZ_SECONDS=600 FUZZ_SEED=7)"
	@echo "make test-chaos  random trouble around searches and trainings: 20 seeded scenarios, ten minutes on two quiet cores"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff rewrite the code"
	@echo "make docs        the API reference from docstrings, in build/api"
	@echo "make benchmark   the CPU speed table of the README (a quiet machine, please)"
	@echo "make clean       remove .venv and caches; results stay"

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"raybsa needs Python 3.11 or newer, got {sys.version.split()[0]}: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv (once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.ready
	@$(BIN)/python jobs/demo.py --out $(DEMO_OUT)

test: .venv/.ready
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-quick: .venv/.ready
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not gpu and not cluster'

test-gpu: .venv/.ready
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -m gpu -n $(GPU_WORKERS) --dist load

fuzz: .venv/.ready
	@$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

test-chaos: .venv/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --seeds 20

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: .venv/.ready
	@$(BIN)/python -W error docs/api.py build/api

benchmark: .venv/.ready
	@$(BIN)/python jobs/benchmark.py --suite cpu --out $(CURDIR)/results/benchmark

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
