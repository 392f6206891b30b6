# Two commands matter on a fresh machine: `make demo` and `make test`. Neither needs a GPU or a model hub.
PYTHON ?= python3
# A fixed torch keeps every checkout on the same kernels; any of 2.11 to 2.13 is supported.
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help install demo serve test check format bench docs clean

help: ## Say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 18

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Loraplex needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# torch's CUDA builds bring Triton along; a CPU build needs one whose interpreter runs the kernels' tests.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	@touch $@

install: $(READY) ## Set up .venv with everything the project needs

demo: $(READY) ## Serve the embedded demo model, talk to its adapters, upload one more, and exit
	$(BIN)/loraplex demo

serve: $(READY) ## Serve the embedded demo model with its adapters until Ctrl-C
	$(BIN)/loraplex demo --keep

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest

check: $(READY) ## Check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## Compare with transformers + peft on this machine's CPU
	$(BIN)/loraplex bench serve --shape qwen2.5-0.5b --device cpu --adapters 4 --concurrency 1,8 --num-requests 2x --warmup 2 \
	  --prompt-tokens 32 --output-tokens 64 --peers transformers,transformers-plain

docs: $(READY) ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## Remove what was made
	rm -rf $(VENV) site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
