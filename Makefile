# The two commands of README: `make run` and `make test`. Both set up .venv first.
PYTHON ?= python3
STUDY ?= grid
VENV := .venv
BIN := $(VENV)/bin
export TORCH
# `make TORCH=cpu run` changes an installation; TORCH in the environment only chooses for a new one.
AGAIN := $(if $(filter command,$(origin TORCH)),FORCE)

.PHONY: run test test-unit test-full test-long lint bench clean FORCE

run: $(VENV)/installed
	@$(BIN)/hpo run --study $(STUDY) $(ARGS)

# Three at once: on two cores the tests that wait for something leave room for one more. One thread each, so that they do
# not take each other's cores. Which tests stay together, and which come first: tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder --durations=15

test: $(VENV)/installed-dev
	@$(PYTEST) -m "not slow and not apt and not root and not long" $(ARGS)
	@echo "Left out: the tests marked slow, apt (packages of the system), root and long. make test-full and test-long run them."

test-unit: $(VENV)/installed-dev
	@$(PYTEST) -m "not slow and not long" tests/unit $(ARGS)

test-full: $(VENV)/installed-dev
	@sh tests/system-packages
	@$(PYTEST) -m "(slow or apt or root) and not long" $(ARGS)

test-long: $(VENV)/installed-dev
	@sh tests/system-packages
	@$(PYTEST) -m long $(ARGS)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The short benchmarks, each beside its rival where there is one: ten to eleven minutes on two cores. The long ones:
# docs/reference/performance.md.
bench: $(VENV)/installed
	@$(BIN)/python bench/training_speed.py --epochs 3
	@$(BIN)/python bench/frozen_features.py
	@$(BIN)/python bench/overhead.py --trials 1 --epochs 150
	@$(BIN)/python bench/report_of_a_thousand.py
	@$(BIN)/python bench/growth.py --trials 100 --studies 4 --epochs 3
	@$(BIN)/python bench/throughput.py --workers 2 --trials 20 --study 0 --rival optuna optuna-no-model calls
	@$(BIN)/python bench/start.py --rounds 1

# An interrupted `venv` leaves a python without pip: then it is made again. One that is complete is used as it is.
$(VENV)/ready:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "hpo needs Python 3.11, 3.12 or 3.13, found %d.%d. Try: make PYTHON=python3.12 run" % sys.version_info[:2])' \
	  && $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

# Which build of PyTorch that is, and TORCH=cpu, default or PATH: docs/how-to/install.md.
$(VENV)/installed: pyproject.toml $(AGAIN) | $(VENV)/ready
	@$(BIN)/python install.py
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(AGAIN) | $(VENV)/ready
	@$(BIN)/python install.py --extra dev
	@touch $@ $(VENV)/installed

FORCE:

clean:
	rm -rf $(VENV) *.egg-info
