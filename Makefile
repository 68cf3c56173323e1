# Four words, and CI runs exactly these. The virtual environment is .venv in the checkout.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup browser check test demo
setup: .venv/.done browser

# The Studio's test drives a real browser; everything else does without.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	     apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "tests/test_serve_studio.py needs a browser: apt-get install chromium"

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

# The pipeline's tests mostly wait for processes to start, so the others run beside them.
test: setup
	@log=$$(mktemp); $(BIN)/pytest tests/test_pipeline.py > "$$log" 2>&1 & pipeline=$$!; \
	$(BIN)/pytest --ignore=tests/test_pipeline.py; others=$$?; \
	wait $$pipeline; status=$$?; cat "$$log"; rm "$$log"; exit $$((others | status))

demo: setup
	$(BIN)/pixart demo
