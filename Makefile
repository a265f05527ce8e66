# `make` alone lists the targets. Everything is installed into .venv in this checkout, pinned by constraints.txt.
PYTHON ?= python3
VENV   := .venv
# Test files that run at the same time; those that start several processes of their own run one by one.
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# DeepSpeed compiles a small C++ extension at first use. In a cache shared by several environments each would compile
# it again whenever another one had run.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help install demo test slow soak bench lint format clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s%s\n", $$1, $$2 }'

install: $(VENV)/.installed ## make .venv with everything that demo, tests and checks need

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	    { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11: name a newer one, for example make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments: on Debian, apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision
	$(PIP) install -c constraints.txt -e ".[dev,deepspeed,report]"
	@touch $@

demo: install ## synthetic data -> shards -> pre-training on two processes -> export, on any machine
	$(BIN)/python tools/demo.py

test: install ## the tests, two-process engine tests included
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not engine and not slow and not soak"
	$(BIN)/python -m pytest -m "engine and not slow and not soak"

slow: install ## the long multi-process matrix
	$(BIN)/python -m pytest -m "slow and not soak" --timeout=1800

soak: install ## the longest tests
	$(BIN)/python -m pytest -m "soak" --timeout=7200

bench: install ## measure, and write docs/BENCHMARKS.md
	$(BIN)/python tools/bench/all.py

lint: install ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; keeps .venv, data and runs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
