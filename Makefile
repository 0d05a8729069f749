# `make help` lists the targets. Everything is installed into .venv, except mosquitto (see setup).

TASK ?= digits
PIP_ARGS ?=
DATA ?=
NAME ?=
KEEP ?=
MOSQUITTO ?=
CHROMIUM ?=
KILLS ?= 1000
SEED ?=
ENGINE ?= mosquitto
PRIVATE ?=

VENV := .venv
BIN := $(VENV)/bin
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
CUDA_HINT := On Linux the default torch brings several GB of CUDA. Without a GPU: make PIP_ARGS='$(CPU_INDEX)'
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# A demo of digits-numpy needs only a part of the packages, without torch. Either set may be installed first; a stamp file
# marks each installed set.
SMALL := $(VENV)/installed-without-torch
FULL := $(VENV)/installed
NATIVE := aggregator/native
INSTALLED_FROM := pyproject.toml constraints.txt $(wildcard $(NATIVE)/*.*)

ifeq ($(TASK),digits-numpy)
DEMO_NEEDS := $(if $(wildcard $(FULL)),$(FULL),$(SMALL))
else
DEMO_NEEDS := $(FULL)
endif

# Tests that start processes or train are marked slow: `make check` skips them, `make test` runs them. Longer ones are
# marked extended, and run by `make test-extended` only.
JOBS ?= 2
# Tests of one file may build on each other. The order of the files is that of tests/conftest.py.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
CORE_TESTS := -m "not slow and not extended"
SLOW_TESTS := -m "slow and not extended"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo check lint types core test test-extended chromium fuzz crash-test bench experiment docs format clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18
	@echo "Variables:"
	@echo "  TASK=digits    the demo's task: digits, digits-numpy (needs no torch), one of docs/tasks.md"
	@echo "  KEEP=yes       experiment: copy the result to benchmarks/results/experiments, for docs/figures.md"
	@echo "  PIP_ARGS=…     further options of pip; on Linux, for torch without CUDA: PIP_ARGS='$(CPU_INDEX)'"
	@echo "  JOBS=2         processes that run tests at the same time"
	@echo "  PYTHON=…       Python executable for $(VENV); MOSQUITTO=no: do not install mosquitto; CHROMIUM=no: nor chromium"

setup: $(FULL) ## Make .venv with all packages, and install mosquitto if possible

demo: $(DEMO_NEEDS) ## Run a federation on this machine: broker, aggregator, 8 devices, evaluator (TASK=…)
	@$(BIN)/ternbus lab run --task $(TASK)

check: lint types core ## Lint, types, layers and core tests

lint: $(FULL)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(FULL)
	$(BIN)/mypy

core: $(FULL)
	$(BIN)/python -m pytest -q $(PARALLEL) --cov --cov-report=term $(CORE_TESTS)

test: check chromium ## check, then the tests that start processes or train, then a minute of fuzzing
	$(BIN)/python -m pytest -q $(PARALLEL) $(SLOW_TESTS)
	$(BIN)/python -m fuzz --seconds 60

test-extended: $(FULL) chromium ## Run the tests that take too long for `make test`
	$(BIN)/python -m pytest -q $(PARALLEL) -m extended

chromium: # for the tests of the dashboard, which are skipped without
	@$(INSTALL_CHROMIUM)

fuzz: $(FULL) ## Fuzz each parser with a million inputs (x86-64 Linux)
	$(BIN)/python -m fuzz --runs 1000000

crash-test: $(FULL) ## Kill a federation at random, and compare it with one left alone: KILLS=1000 SEED=n ENGINE=mosquitto|nats PRIVATE=yes
	PYTHONPATH=tests $(BIN)/python -m crash --kills $(KILLS) $(if $(SEED),--seed $(SEED)) --engine $(ENGINE) $(if $(PRIVATE),--private)

bench: $(FULL) ## Run the benchmarks into benchmarks/results, under 15 minutes (DATA=DIR with FashionMNIST/raw for all of them)
	$(BIN)/python -m benchmarks $(if $(DATA),--data '$(DATA)')

experiment: $(FULL) ## Run an experiment and print its table: NAME=…, DATA=DIR; without NAME list the experiments
	$(BIN)/ternbus lab experiment $(NAME) $(if $(DATA),--data '$(DATA)') $(if $(KEEP),--keep benchmarks/results/experiments)

docs: $(FULL) ## Write docs/reference from the code, and build the site of all pages into build/site
	$(BIN)/python -m manual --write --site

format: $(FULL) ## Format the code and apply the linter's fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove .venv and all other generated files
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache ternbus-lab

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "Making $(VENV) with $$python"; \
	        exec $$python -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo "No Python 3.11 or later with its venv module found: on Debian or Ubuntu, run" >&2; \
	echo "apt-get install python3 python3-venv; or choose one with make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(SMALL): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing Ternbus, without torch, into $(VENV)"
	@$(PIP_INSTALL) -e '.[broker,lab,dashboard]'
	@touch $@

$(FULL): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing Ternbus, torch and the development tools into $(VENV)"
	@$(if $(PIP_ARGS),,if [ "$$(uname)" = Linux ]; then echo "$(CUDA_HINT)"; fi)
	@$(PIP_INSTALL) -e '.[all]'
	@if command -v cc > /dev/null; then $(PIP_INSTALL) ./$(NATIVE) || echo "$(NATIVE) was not installed: numpy is used instead"; fi
	@$(INSTALL_MOSQUITTO)
	@touch $(SMALL) $@

# Chromium for tests of the dashboard. A machine that may not install packages runs the other tests.
define INSTALL_CHROMIUM
for name in chromium chromium-browser google-chrome; do if command -v $$name > /dev/null; then exit 0; fi; done; \
if [ "$$(id -u)" = 0 ]; then root=env; else root="sudo -n env"; fi; \
if [ "$(CHROMIUM)" != no ] && command -v apt-get > /dev/null && $$root true 2> /dev/null; then \
    echo "Installing chromium with apt-get, for tests of the dashboard (CHROMIUM=no skips this)"; \
    install="$$root DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends chromium"; \
    if $$install || { $$root apt-get -qq update && $$install; }; then exit 0; fi; \
fi; \
echo "chromium is not installed: tests of the dashboard in a browser are skipped."
endef

# mosquitto is the faster broker, and the tests use it if it is installed; otherwise they use nats-server from above.
define INSTALL_MOSQUITTO
PATH="$$PATH:/usr/sbin:/usr/local/sbin"; \
if command -v mosquitto > /dev/null; then \
    echo "mosquitto: $$(command -v mosquitto)"; exit 0; \
fi; \
if [ "$$(id -u)" = 0 ]; then root=env; else root="sudo -n env"; fi; \
if [ "$(MOSQUITTO)" != no ] && command -v apt-get > /dev/null && $$root true 2> /dev/null; then \
    echo "Installing mosquitto with apt-get (MOSQUITTO=no skips this). With systemd, Debian starts it at once on"; \
    echo "127.0.0.1:1883. Ternbus starts its own, so run: sudo systemctl disable --now mosquitto"; \
    install="$$root DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends mosquitto"; \
    if $$install || { $$root apt-get -qq update && $$install; }; then exit 0; fi; \
fi; \
echo "mosquitto is not installed: the broker is nats-server, and tests of mosquitto are skipped."; \
echo "To install it, run: apt-get install mosquitto"
endef
