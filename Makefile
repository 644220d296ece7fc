# `make help` lists the targets. Everything is installed into .venv from the pinned requirements.
# TORCH_INDEX is where pip takes torch, and nothing else, from (README, "Torch for your GPU"); .venv remembers it.
PYTHON ?= python3
BENCH_DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
KNOWN_INDEX := $(shell cat $(VENV)/torch_index 2>/dev/null)
TORCH_INDEX ?= $(KNOWN_INDEX)
export TOKENIZERS_PARALLELISM := true

.DEFAULT_GOAL := help
.PHONY: torch_index help install demo race compare test test-browser test-kill screenshots bench audit lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/run.stamp: requirements.txt $(if $(filter-out $(KNOWN_INDEX),$(TORCH_INDEX)),torch_index)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(if $(TORCH_INDEX),--clear) $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) "$$(grep ^torch== requirements.txt)")
	$(if $(TORCH_INDEX),@echo $(TORCH_INDEX) > $(VENV)/torch_index)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@mkdir -p runs
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

torch_index: # another one than in .venv: .venv is made anew

install: $(VENV)/run.stamp ## set up .venv only, as on a login node; TORCH_INDEX= for another build of torch

demo: $(VENV)/run.stamp ## the whole chain on the embedded corpus, on any machine, in minutes
	$(BIN)/python -m race.chain demo

race: $(VENV)/run.stamp ## the whole chain on RACE with albert-base-v2, on a GPU node
	$(BIN)/python -m race.chain race

compare: $(VENV)/run.stamp ## five recipes with three seeds each on the demo, and how sure the differences are
	$(BIN)/python -m race.chain demo --recipe chain constant resets step linear --seeds 1 2 3

test: $(VENV)/dev.stamp lint ## lint, unit tests, and all notebooks on a small demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-kill: $(VENV)/dev.stamp ## over a hundred kills of a small chain, compared byte for byte (about a quarter of an hour)
	$(BIN)/python -m pytest -m kill -s

audit: $(VENV)/dev.stamp ## look all installed versions up in the database of known vulnerabilities (needs the network)
	test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/pip install --quiet pip-audit==2.10.1; }
	PIPAPI_PYTHON_LOCATION=$(abspath $(BIN))/python $(VENV)-audit/bin/pip-audit

test-browser: $(VENV)/dev.stamp ## the stages and evaluations in JupyterLab, in a headless chromium; pictures in runs/browser
	$(BIN)/python -m pytest tests/browser.py

screenshots: $(VENV)/dev.stamp ## remake the pictures of docs/ from the demo, in a headless chromium
	$(BIN)/python tests/screenshots.py

bench: $(VENV)/run.stamp ## measure everything against what a user would otherwise run; BENCH_DEVICE=cuda on a GPU
	$(BIN)/python -m bench.cache --rounds 1
	$(BIN)/python -m bench.train_step --device $(BENCH_DEVICE)
	$(BIN)/python -m bench.evaluate --device $(BENCH_DEVICE) --rounds 1
	$(BIN)/python -m bench.families
	$(BIN)/python -m bench.tables

lint: $(VENV)/dev.stamp ## ruff, and no notebook with outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify *.ipynb

format: $(VENV)/dev.stamp ## let ruff and nbstripout fix what lint reports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout *.ipynb

clean: ## remove what running has made: the demo's cache, checkpoints and runs
	rm -rf cache/demo checkpoints/demo checkpoints/demo-* runs/demo runs/demo-* runs/browser
