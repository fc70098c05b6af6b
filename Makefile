# make quickstart: install and train the four small stages (minutes, no GPU)
# make test:       install and run the tests
# make test-faults: kill real runs, 20 of them at random moments (FAULTS=N),
#                   comparisons and pairs of processes; an hour
# make lint:       install and check style, types and the scripts of launch/
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart

.PHONY: quickstart test test-faults lint format everything clean
# A Python without venv leaves a folder that only looks finished.
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(RUN) main.py --config=configs/quickstart.py --workdir=$(WORKDIR)

# PARITY=1 adds PyTorch, timm, TensorFlow and the compiler for TPUs, and fails if
# a comparison with them is skipped.
ifdef PARITY
test: $(VENV)/installed-parity
	JAXPROG_PARITY=1 $(RUN) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
else
test: $(VENV)/installed-test
	$(RUN) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
endif

# Prints what came of each run, and a table in the end.
FAULTS ?= 20
test-faults: $(VENV)/installed-faults
	JAXPROG_FAULTS=$(FAULTS) $(RUN) -m pytest -m 'faults or slow' tests $(PYTEST_ARGS)

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck launch/*.sh launch/*.sbatch

format: $(VENV)/installed-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "jaxprog needs Python 3.11, 3.12 or 3.13; set PYTHON=python3.12")'
	@echo 'Installing jaxprog, JAX, Flax and what else they need into $(VENV):' \
	  '350 MB to download, 1.4 GB on disk.'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo 'Installing what the tests need into $(VENV).'
	$(RUN) -m pip install --editable '.[test]'
	touch $@

$(VENV)/installed-faults: $(VENV)/installed-test
	@echo 'Installing Ray, for hosts that can be lost, into $(VENV).'
	$(RUN) -m pip install --editable '.[ray]'
	touch $@

$(VENV)/installed-parity: $(VENV)/installed-test
	@echo 'Installing PyTorch, timm, TensorFlow and the compiler for TPUs into $(VENV).'
	$(RUN) -m pip install --editable '.[parity]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	@echo 'Installing ruff, mypy and shellcheck into $(VENV).'
	$(RUN) -m pip install --editable '.[lint]'
	touch $@

# All of that at once, for .ci/run. What is imported is compiled then: pip would
# compile 22,000 files for a minute.
everything: | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --no-compile --editable '.[test,parity,lint]'
	for extra in '' -test -parity -lint; do touch $(VENV)/installed$$extra; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
