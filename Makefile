# make demo | test | lint | docs    Each sets up .venv once, and again when pyproject.toml, setup.py or csrc changes.
#
# PYTHON   makes .venv; 3.10 or newer.
# TORCH    what pip installs as torch, pip options included. Plain torch from the public index brings CUDA
#          libraries of several gigabytes; on a machine without a GPU name an index of CPU builds:
#              make test TORCH="torch==2.13.0 --index-url URL"
# WORKERS  test processes. Each computes in one thread, so as many as there are cores is right.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs

demo: .venv/demo.done
	$(BIN)/lesa demo

test: .venv/dev.done
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --durations=10

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ into site/; fails on a broken link, and on a table that differs from benchmarks/results.
docs: .venv/dev.done
	$(BIN)/python -m benchmarks.tables --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/torch.done:
	@echo "== 1/2 .venv with $(TORCH) (a minute or more)"
	@$(PYTHON) -m venv .venv
	@$(PIP) "setuptools>=77" wheel
	@$(PIP) $(TORCH)
	@touch $@

# Without build isolation: the C++ kernels are built for the torch that is installed.
.venv/%.done: .venv/torch.done pyproject.toml setup.py $(wildcard csrc/*)
	@echo "== 2/2 lesa[$*] and what it needs (a minute or more)"
	@$(PIP) --no-build-isolation --editable ".[$*]"
	@touch $@
