PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test check gpu clean

demo: $(STAMP)  ## quantize a small real model, serve it, ask it two questions
	$(BIN)/python -m qserve.demo

test: check  ## the whole CPU test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info demo-model
