# make env: the environment; make test: the whole suite; make demo: three stages at tiny size and a report. Each works in a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: env test demo lint

env: $(VENV)/ready

# Rebuilt when the dependencies change. torch is installed by name first, so that the pinned build is the one that stays.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

test: env
	$(BIN)/python -m pytest

demo: env
	$(BIN)/python -m launch.demo --out=out/demo

lint: env
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
