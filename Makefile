# Everything happens in .venv; the first target that needs it makes it.
PYTHON ?= python3
PRESET ?= small
BIN := .venv/bin
RUN ?= runs/demo-$(PRESET)

.DEFAULT_GOAL := help
.PHONY: help demo test test-avx2 test-slow test-clients test-cluster check bench clean
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:
	@echo "make demo    set up, train the constellation on Python's own documentation, print samples and the results table (PRESET=tiny|small)"
	@echo "make test    set up, run the test suite, what computes numbers also as on a processor with AVX2 alone (make test-avx2)"
	@echo "             make test-slow runs the long ones, make test-clients those with other people's clients,"
	@echo "             make test-cluster those that bring up clusters (apt-get install openssh-server rsync)"
	@echo "make check   format, lint, types"
	@echo "make bench   the quick benchmarks: route, train"
	@echo "make clean   remove .venv and caches; runs/ stays"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "constellation needs Python 3.11 or newer; name one: make PYTHON=python3.12" && exit 1)
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: .venv/installed
	@$(BIN)/constellation demo --preset $(PRESET) --run $(RUN)

test: test-avx2
	@$(PYTEST)

# what computes numbers, as a processor with AVX2 and no more would (x86 alone); how the library is made is no number
NUMERIC := $(foreach name,int8 polar native decode engine kronecker model loss,$(wildcard tests/test_*$(name)*.py))
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: export CONSTELLATION_NATIVE_MARCH = haswell
test-avx2: .venv/installed
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
	@$(PYTEST) $(NUMERIC) -k "not library and not processor and not loaded"
endif

test-slow: .venv/installed
	@$(BIN)/python -m pytest -m slow

test-cluster: .venv/installed
	@$(BIN)/python -m pytest -m cluster

# langchain, litellm and lm-eval against the service, each in an environment of its own
test-clients: .venv/clients/langchain .venv/clients/litellm .venv/clients/lm_eval
	@CONSTELLATION_CLIENTS=$(CURDIR)/.venv/clients $(BIN)/python -m pytest tests/test_app_clients.py -m "slow or not slow"

.venv/clients/langchain: PACKAGE = langchain-openai
.venv/clients/litellm: PACKAGE = litellm
.venv/clients/lm_eval: PACKAGE = lm-eval[api] torch==2.13.0
.venv/clients/%: .venv/installed
	@rm -rf $@
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGE) || (rm -rf $@; exit 1)

check: .venv/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: .venv/installed
	@$(BIN)/constellation bench route
	@$(BIN)/constellation bench train

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
