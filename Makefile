# Entry points of the project. Every target that runs Python goes through `make setup`, which is a no-op when nothing changed.
SHELL := /bin/bash
PY := .venv/bin/python
export TORCH TORCH_INDEX PYTHON

.PHONY: help setup test lint type format demo down train-scenes eval-scenes bench bench-gpu chaos docs lock clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## make .venv from requirements.lock (TORCH=cuda|cpu|rocm, TORCH_INDEX=...; the choice is kept)
	@ops/setup.sh

test: setup ## all tests (PYTEST_ARGS adds to the command)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: setup ## ruff and the import arrows
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

type: setup ## mypy --strict on the five packages
	$(PY) -m mypy

format: setup ## let ruff rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: setup ## the main job: one trace, large only against MoDM
	$(PY) -m ops.demo $(DEMO_ARGS)

down: setup ## stop what `modm up` started
	.venv/bin/modm down

train-scenes: setup ## train the bundled models (resumes from its checkpoints)
	$(PY) -m ops.scenes.train $(TRAIN_ARGS)

eval-scenes: setup ## measure the bundled models and write their card
	$(PY) -m ops.scenes.evaluate $(EVAL_ARGS)

bench: setup ## speed of the front, figures of docs/performance.md
	$(PY) -m ops.benchmarks $(BENCH_ARGS)

bench-gpu: setup ## full-size architectures with random weights, where a GPU is at hand
	$(PY) -m ops.benchmarks.gpu $(BENCH_ARGS)

chaos: setup ## kill everything in turn and count what was lost
	$(PY) -m ops.chaos $(CHAOS_ARGS)

docs: setup ## generate docs/settings.md
	$(PY) -m ops.docs_settings

lock: ## compile requirements.lock again (needs the package index)
	.venv/bin/uv pip compile --universal --generate-hashes --python-version 3.11 --extra dev pyproject.toml \
		-o requirements.lock --no-emit-index-url $(LOCK_ARGS)

clean: ## remove build and test leftovers, not .venv and not .modm
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
