# Every target sets up what it needs: a virtual environment, the pinned packages, the compiled extension.
# By hand you need python3 with venv, a C++ compiler and make. Pass options on with ARGS="...".
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --quiet --disable-pip-version-check

# Stamps are named after the content they stand for, so a changed pin or a moved checkout sets up again.
key      = $(firstword $(shell (cat $(1); echo $(CURDIR)) | cksum))
PACKAGES = $(VENV)/packages-$(call key,requirements.txt)
LINK     = $(VENV)/link-$(call key,setup.py pyproject.toml requirements.txt)

.PHONY: help setup train test bench gpu asan wheel packaging lint doctor clean
help:
	@echo "make train      train a GPT on real text        ARGS=\"--config FILE --run.steps 100\""
	@echo "make test       run the tests                   ARGS=\"-k attention\""
	@echo "PYFAST_CUDA=1 make test    and build the CUDA kernels with nvcc, and run them on the emulator"
	@echo "make bench      compare with plain torch        ARGS=\"--model gpt2-124m\""
	@echo "make gpu        on a CUDA machine: tests, sanitizer, counters, bench    ARGS=--dry-run without one"
	@echo "make asan       run the C++ under ASan and UBSan"
	@echo "make wheel      build dist/*.whl with CUDA kernels for every GPU since 8.0"
	@echo "make packaging  install in every supported way, each in a fresh virtual environment"
	@echo "make doctor     say which backend runs where, and why"
	@echo "make lint       check the style"
	@echo "make clean      remove what the targets above made, except runs/"

train: setup
	$(PY) -m pyfast train $(ARGS)

test: setup
	PYFAST_REQUIRE=cpp $(PY) -m pytest -q -n auto --dist worksteal $(ARGS)

bench: setup
	$(if $(ARGS),$(PY) -m bench.train $(ARGS),$(PY) -m bench.ops --quick && $(PY) -m bench.train)

gpu: setup
	$(PY) -m bench.gpu $(ARGS)

doctor: setup
	$(PY) -m pyfast doctor $(ARGS)

lint: $(PACKAGES)
	$(PY) -m ruff check .

packaging: $(PACKAGES)
	$(PY) -m pytest -q tests/test_packaging.py --packaging $(ARGS)

# One for the Python of VENV: make wheel PYTHON=python3.13 VENV=.venv313 builds another. PTX of 8.0 is for
# GPUs whose own code is not there, of 12.0 for those to come.
WHEEL_ARCHS = 80+PTX;86;89;90a;100a;120+PTX
wheel: $(PACKAGES)
	PYFAST_BUILD_EXT=1 PYFAST_CUDA=1 PYFAST_CUDA_ARCH="$(WHEEL_ARCHS)" \
		$(PIP) wheel --no-build-isolation --no-deps -w dist $(ARGS) .
	@ls -l dist/*.whl

asan: setup
	$(PY) tests/sanitize.py $(ARGS)

setup: $(LINK)
	@ls pyfast/_C.*.so > /dev/null 2>&1 || echo "compiling the C++ kernels: minutes, once"
	@$(PY) pyfast/build.py > /dev/null

$(LINK): $(PACKAGES)
	@rm -f $(VENV)/link-*
	@PYFAST_BUILD_EXT=0 $(PIP) install --no-build-isolation --no-deps -e . 2> $(VENV)/pip.log || \
		{ cat $(VENV)/pip.log; false; }
	@touch $@

$(PACKAGES):
	@echo "installing the packages of requirements.txt into $(VENV): a minute or two, once"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/packages-*
	@$(PIP) install -r requirements.txt
	@$(HAS_HEADERS) || $(UNPACK_HEADERS)
	@touch $@

# Debian keeps Python.h in a package of its own, which need not be installed to compile with it.
ask            = $$($(abspath $(PY)) -c "import sysconfig; print(sysconfig.$(1))")
HAS_HEADERS    = test -e $(call ask,get_path('include'))/Python.h
UNPACK_HEADERS = { echo "unpacking Python.h into $(VENV)"; mkdir -p $(VENV)/headers; \
	(cd $(VENV)/headers && apt-get -qq download libpython$(call ask,get_python_version())-dev && \
	dpkg -x *.deb . && cp -r usr/include/. ../include/); rm -rf $(VENV)/headers; }

clean:
	rm -rf $(VENV) build dist *.egg-info pyfast/_C.*.so
