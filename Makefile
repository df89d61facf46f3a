PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test check gpu clean

demo: .venv/installed-demo  ## quantize a small real model, serve it, ask it two questions
	$(BIN)/python -m qserve.demo

test: check  ## the whole CPU test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: .venv/installed-dev  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.venv/installed-demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[demo,gpu]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[dev,demo]'
	touch $@ .venv/installed-demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info demo-model
