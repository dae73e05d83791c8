# Two commands set everything up: `make quickstart` and `make test`. CONTRIBUTING.md says what the others are for.

export JAX_PLATFORMS ?= cpu

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
PACKAGES := jaxquant pallas_kernels
PINS := pyproject.toml constraints.txt

.PHONY: help quickstart test aot lint format types wheel newest docs clean

help:
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/quickstart.stamp  ## quantize the embedded model with each recipe and print the table
	$(PYTHON) -m experiments.quickstart

test: .venv/test.stamp  ## the whole test suite, on a CPU
	$(PYTHON) -m pytest -n 2 --dist worksteal

aot: .venv/test.stamp .venv/aot.stamp  ## compile the kernels for an H200; SINCE=commit: only those changed since
	scripts/aot.sh $(SINCE)

lint: .venv/test.stamp  ## formatting and lint, changing nothing
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

format: .venv/test.stamp  ## rewrite the sources as `make lint` wants them
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

types: .venv/test.stamp  ## pyright on both packages
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

wheel: .venv/test.stamp  ## build the wheel; test it, and its doctests, from outside the tree
	scripts/test_wheel.sh

newest: .venv/created.stamp  ## the dispatch tests on the newest jax
	scripts/test_newest_jax.sh

docs: .venv/docs.stamp  ## the API pages, under build/docs
	$(PYTHON) -m pdoc --docformat google --output-directory build/docs $(PACKAGES)

clean:  ## remove what was built, but not .venv
	rm -rf build dist .venv-wheel .venv-newest .aot .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/created.stamp:
	python=$$(scripts/find_python.sh) && "$$python" -m venv .venv
	@touch $@

.venv/quickstart.stamp: .venv/created.stamp $(PINS)
	@echo "Installing jaxquant and what the experiments need into .venv (about a minute) ..."
	$(PIP) -c constraints.txt -e '.[experiments]'
	@touch $@

.venv/test.stamp: .venv/created.stamp $(PINS) tests/third_party.txt
	@echo "Installing jaxquant and its test tools into .venv (about a minute) ..."
	$(PIP) -c constraints.txt -e '.[experiments,test]'
	$(PIP) --no-deps -r tests/third_party.txt
	@touch $@ .venv/quickstart.stamp

.venv/aot.stamp: .venv/created.stamp $(PINS)
	@echo "Installing the CUDA compiler wheels into .venv ..."
	$(PIP) -c constraints.txt -e '.[aot]'
	@touch $@

.venv/docs.stamp: .venv/created.stamp $(PINS)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@
