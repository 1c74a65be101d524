# The commands of this repository. CI runs the same targets, so what is green here is green there.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DISTRIBUTIONS := protos shared services/cas services/scheduler services/worker
SOURCES := protos/src/lathe_protos shared/src services/cas/src services/scheduler/src services/worker/src
export PYTHON

# One version of everything, also of what only builds our own distributions.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/.runtime ## Run all three services on loopback, in the foreground
	@exec $(BIN)/python -m tools.run

.PHONY: test
test: $(VENV)/.development ## Run all tests that need no Docker (TESTS=... for some of them)
	@LATHE_REQUIRE_ALL=1 exec $(BIN)/python -m pytest $(TESTS)

.PHONY: test-compose
test-compose: $(VENV)/.development packages-compose ## Build the images, run the compose stack, and Bazel through it; needs a Docker engine
	@LATHE_REQUIRE_ALL=1 exec $(BIN)/python -m pytest $(or $(TESTS),tests/compose)

.PHONY: check
check: $(VENV)/.development ## Lint, types, import contracts, generated code: what CI runs beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) tools tests
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/python tools/config_reference.py --check

.PHONY: bench
bench: $(VENV)/.development ## Measure (QUICK=1: short; ROWS=REGEX; TARGET=HOST:PORT: any REAPI server)
	@exec $(BIN)/python -m tools.bench $(if $(QUICK),--quick) $(if $(ROWS),--rows '$(ROWS)') \
		$(if $(TARGET),--target '$(TARGET)') $(if $(INSTANCE),--instance-name '$(INSTANCE)')

.PHONY: format
format: $(VENV)/.development ## Let ruff mend and format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(VENV)/.development ## Generate the betterproto classes from the .proto files
	$(BIN)/python tools/generate_protos.py

.PHONY: clean
clean: ## Remove the virtual environment and what tools leave behind; never a data directory
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What apt installs is looked for each time, which takes no time when all is there.
.PHONY: packages-run packages-test packages-compose
packages-run:
	@tools/system_packages.sh run
packages-test:
	@tools/system_packages.sh test
packages-compose:
	@tools/system_packages.sh compose

# A virtual environment holds absolute paths: one that was moved or copied along with its checkout is made again.
ifneq ($(file <$(VENV)/.made-for),$(CURDIR))
$(VENV)/.made-for: FORCE
endif
.PHONY: FORCE
FORCE:

$(VENV)/.made-for: | packages-run
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "$(CURDIR)" > $@

$(VENV)/.runtime: $(VENV)/.made-for constraints.txt $(DISTRIBUTIONS:%=%/pyproject.toml) | packages-run
	@echo "Installing Lathe into $(VENV)"
	@$(PIP) hatchling editables
	@$(PIP) $(DISTRIBUTIONS:%=-e %)
	@touch $@

$(VENV)/.development: $(VENV)/.runtime requirements-dev.txt | packages-test
	@echo "Installing what tests and checks need into $(VENV)"
	@$(PIP) -r requirements-dev.txt
	@touch $@
