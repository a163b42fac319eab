# Every target sets up what it needs: a virtual environment, the pinned packages, the compiled extension.
# By hand you need python3 with venv, a C++ compiler and make. Pass options on with ARGS="...".
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python

# Stamps are named after the content they stand for, so a changed pin or a moved checkout sets up again.
key     = $(firstword $(shell (cat $(1); echo $(CURDIR) $(2)) | cksum))
DEPS   := $(VENV)/deps-$(call key,requirements.txt,)
INSTALL:= $(VENV)/install-$(call key,setup.py pyproject.toml requirements.txt,$(wildcard pyfast/*/__init__.py))

.PHONY: help setup train test bench asan packaging lint doctor clean
help:
	@echo "make train      train a GPT on real text        ARGS=\"--config FILE --run.steps 100\""
	@echo "make test       run the tests                   ARGS=\"-k attention\""
	@echo "make bench      compare with plain torch        ARGS=\"--steps 20\""
	@echo "make asan       run the C++ under ASan and UBSan"
	@echo "make packaging  install in every supported way, each in a fresh virtual environment"
	@echo "make doctor     say which backend runs where, and why"
	@echo "make lint       check the style"
	@echo "make clean      remove what the targets above made, except runs/"

train: setup
	$(PY) -m pyfast train $(ARGS)

test: setup
	$(PY) -m pytest -q $(ARGS)

bench: setup
	$(PY) -m bench.train $(ARGS)

doctor: setup
	$(PY) -m pyfast doctor $(ARGS)

lint: $(DEPS)
	$(PY) -m ruff check .

packaging: $(DEPS)
	$(PY) -m pytest -q tests/test_packaging.py --packaging $(ARGS)

asan: setup
	$(PY) tests/sanitize.py $(ARGS)

setup: $(INSTALL)
	@$(PY) pyfast/build.py

$(INSTALL): $(DEPS)
	@rm -f $(VENV)/install-*
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(DEPS): 
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/deps-*
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyfast/_C.*.so
