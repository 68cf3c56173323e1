# Four words, and CI runs exactly these. The virtual environment is .venv in the checkout.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup install tools check audit sbom test demo
setup: .venv/.done tools

# What tests drive besides Python; one that misses its tool says so and skips.
TOOLS := chromium postgresql prometheus shellcheck rclone sqlite3
tools:
	@dpkg -s $(TOOLS) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	     apt-get install -y -qq --no-install-recommends $(TOOLS) >/dev/null; } \
	  || echo "some tests drive tools that may be missing: apt-get install $(TOOLS)"

# Into .venv, and the only step of cluster/Dockerfile. TORCH= keeps the torch of the Python that is
# there, as GPU images bring their own; DEV adds what tests and checks need.
TORCH ?= torch
DEV ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c .venv/constraints.txt
install:
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) .venv
	grep -v '$(if $(TORCH),^$$,^torch==)' constraints.txt > .venv/constraints.txt
	$(PIP) "pip>=25.1"
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) -e '.[server]' $(DEV)

.venv/.done: pyproject.toml constraints.txt
	$(MAKE) install DEV='--group dev'
	touch .venv/.done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_layout.py tests/test_cluster_audit.py

# Known vulnerabilities of what is pinned, as the package index's advisories have them today; what it
# cannot judge is no success. It needs a network, so check does less (cluster/security.md). And what
# is installed, as CycloneDX. Their tools lie apart, or they would be part of what they list.
.venv/audit/.done: .venv/.done
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet --disable-pip-version-check "pip>=25.1" -c constraints.txt
	.venv/audit/bin/pip install --quiet --disable-pip-version-check --group audit -c constraints.txt
	touch .venv/audit/.done

audit: .venv/audit/.done
	.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

sbom: .venv/audit/.done
	mkdir -p dist
	.venv/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-format JSON --output-file dist/sbom.json .venv/bin/python

# Some tests mostly wait for processes to start, so two groups of them run beside the others.
SERVERS := tests/test_cluster_doctor.py tests/test_cluster_stack.py tests/test_registry_for_teams.py \
  tests/test_jobs_ablation.py
PIPELINES := tests/test_jobs_evaluate.py tests/test_pipeline.py
test: setup
	@logs=$$(mktemp -d); \
	$(BIN)/pytest $(SERVERS) > "$$logs/servers" 2>&1 & servers=$$!; \
	$(BIN)/pytest $(PIPELINES) > "$$logs/pipelines" 2>&1 & pipelines=$$!; \
	$(BIN)/pytest $(addprefix --ignore=,$(SERVERS) $(PIPELINES)); status=$$?; \
	wait $$servers || status=1; wait $$pipelines || status=1; \
	cat "$$logs"/*; rm -r "$$logs"; exit $$status

demo: setup
	$(BIN)/pixart demo
