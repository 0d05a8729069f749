# `make help` lists the targets. Everything is installed into .venv and nothing outside it, but for mosquitto (see setup).

TASK ?= digits
PIP_ARGS ?=
DATA ?=
NAME ?=
KEEP ?=
MOSQUITTO ?=

VENV := .venv
BIN := $(VENV)/bin
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
CUDA_HINT := On Linux the default torch brings several GB of CUDA. Without a GPU: make PIP_ARGS='$(CPU_INDEX)'
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# What a demo of digits-numpy needs is a part of what everything else needs, torch being most of the difference. Either
# may be installed first; a stamp says how far the environment has come.
SMALL := $(VENV)/installed-without-torch
FULL := $(VENV)/installed
NATIVE := aggregator/native
INSTALLED_FROM := pyproject.toml constraints.txt $(wildcard $(NATIVE)/*.*)

ifeq ($(TASK),digits-numpy)
DEMO_NEEDS := $(if $(wildcard $(FULL)),$(FULL),$(SMALL))
else
DEMO_NEEDS := $(FULL)
endif

# Tests that start processes or train are marked slow; check leaves them to test.
CORE_TESTS := -m "not slow"
SLOW_TESTS := -m slow

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo check lint types core test fuzz bench experiment format clean

help: ## List these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18
	@echo "Variables:"
	@echo "  TASK=digits    the demo's task: digits, digits-numpy (needs no torch), one of docs/tasks.md"
	@echo "  KEEP=yes       experiment: put the result into benchmarks/results/experiments, for README's figures"
	@echo "  PIP_ARGS=…     handed to pip. On Linux, for torch without CUDA: PIP_ARGS='$(CPU_INDEX)'"
	@echo "  PYTHON=…       the Python to make $(VENV) with; MOSQUITTO=no: do not install mosquitto"

setup: $(FULL) ## Make .venv with everything in it, and install mosquitto where that is possible

demo: $(DEMO_NEEDS) ## Run a federation on this machine: broker, aggregator, 8 devices, evaluator (TASK=…)
	@$(BIN)/ternbus lab run --task $(TASK)

check: lint types core ## Lint, types, layers and the tests of the core: under 3 minutes

lint: $(FULL)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(FULL)
	$(BIN)/mypy

core: $(FULL)
	$(BIN)/coverage run -m pytest -q $(CORE_TESTS)
	$(BIN)/coverage report

test: check ## check, then the tests that start brokers and processes, and that train, then a minute of fuzzing
	$(BIN)/python -m pytest -q $(SLOW_TESTS)
	$(BIN)/python -m fuzz --seconds 60

fuzz: $(FULL) ## A million hostile inputs to each parser (x86-64 Linux)
	$(BIN)/python -m fuzz --runs 1000000

bench: $(FULL) ## Measure everything into benchmarks/results, under 15 minutes (DATA=DIR with FashionMNIST/raw for all of it)
	$(BIN)/python -m benchmarks $(if $(DATA),--data '$(DATA)')

experiment: $(FULL) ## Run an experiment and print its table: NAME=…, DATA=DIR; without a NAME list them
	$(BIN)/ternbus lab experiment $(NAME) $(if $(DATA),--data '$(DATA)') $(if $(KEEP),--keep benchmarks/results/experiments)

format: $(FULL) ## Format the code, and mend what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove .venv and everything else that was made here
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache ternbus-lab

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "Making $(VENV) with $$python"; \
	        exec $$python -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo "Ternbus needs Python 3.11 or later with its venv module, and finds none: on Debian or Ubuntu," >&2; \
	echo "apt-get install python3 python3-venv; or name one with make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(SMALL): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing Ternbus, without torch, into $(VENV)"
	@$(PIP_INSTALL) -e '.[broker,lab]'
	@touch $@

$(FULL): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing Ternbus, torch and the development tools into $(VENV)"
	@$(if $(PIP_ARGS),,if [ "$$(uname)" = Linux ]; then echo "$(CUDA_HINT)"; fi)
	@$(PIP_INSTALL) -e '.[all]'
	@if command -v cc > /dev/null; then $(PIP_INSTALL) ./$(NATIVE) || echo "$(NATIVE) is left out: numpy does the same"; fi
	@$(INSTALL_MOSQUITTO)
	@touch $(SMALL) $@

# mosquitto is the faster broker, and the tests use it where it is; nats-server, installed above, stands in without it.
define INSTALL_MOSQUITTO
PATH="$$PATH:/usr/sbin:/usr/local/sbin"; \
if command -v mosquitto > /dev/null; then \
    echo "mosquitto: $$(command -v mosquitto)"; exit 0; \
fi; \
if [ "$$(id -u)" = 0 ]; then root=env; else root="sudo -n env"; fi; \
if [ "$(MOSQUITTO)" != no ] && command -v apt-get > /dev/null && $$root true 2> /dev/null; then \
    echo "Installing mosquitto with apt-get (MOSQUITTO=no leaves it out). Where systemd runs, Debian starts it at once,"; \
    echo "on 127.0.0.1:1883; Ternbus starts its own, so: sudo systemctl disable --now mosquitto"; \
    install="$$root DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends mosquitto"; \
    if $$install || { $$root apt-get -qq update && $$install; }; then exit 0; fi; \
fi; \
echo "mosquitto is not installed here. The broker will be nats-server, and tests of mosquitto will be skipped;"; \
echo "to have both: apt-get install mosquitto"
endef
