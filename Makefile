# make demo   the main job on real data, nothing downloaded but packages
# make test   lint, types and the whole test suite
# Both make their own virtual environment first; VENV and PYTHON choose another place or interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.vbpfx-installed

.PHONY: demo test lint compilers retention coverage fuzz weights docs wheel versions clean

demo: $(INSTALLED)
	$(BIN)/vbpfx demo --out demo-output

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What make test skips: the compilers that are large to install.
compilers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[test,compilers]"
	$(BIN)/python -m pytest -n 2 tests/test_examples.py tests/test_exported.py tests/test_fx_pass.py tests/test_runtimes.py

retention: $(INSTALLED)
	$(BIN)/python benchmarks/retention.py

coverage: $(INSTALLED)
	$(BIN)/python benchmarks/coverage.py

fuzz: $(INSTALLED)
	$(BIN)/python benchmarks/fuzz.py --examples 20000 --seed 0 -j 2

weights: $(INSTALLED)
	$(BIN)/python -m vbpfx.demo.train_digits
	$(BIN)/python benchmarks/small_networks.py --train

# The documentation as a site, in build/site. A warning, a dead link or a missing heading is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and source distribution in dist/, checked, and imported in an empty environment.
wheel: $(INSTALLED)
	.ci/wheel $(BIN)/python

# A part of the tests on the lowest and the newest dependencies, on the Pythons that the machine has. Large downloads.
versions: $(INSTALLED)
	.ci/versions $(BIN)/python

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output
