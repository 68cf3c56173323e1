# Four words, and CI runs exactly these. The virtual environment is .venv in the checkout.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup check test demo
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "pip>=25.1" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e . --group dev -c constraints.txt
	touch .venv/.done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_layout.py

test: setup
	$(BIN)/pytest

demo: setup
	$(BIN)/pixart demo
