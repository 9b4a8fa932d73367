# `make up` and `make test` each do all of their set-up. PYTHON and CONSTRAINTS: see scripts/make_venv.sh.
PYTHON ?=
# a machine with a GPU takes pip's own build of torch, or keeps the one it has
CONSTRAINTS ?= $(if $(wildcard /dev/nvidia0 /dev/kfd),,requirements/cpu.txt)
ARGS ?=
export PYTHON CONSTRAINTS

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv up test test-gpu eval lint format protos docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

venv:  ## build .venv in the checkout (does nothing when it is up to date)
	@bash scripts/make_venv.sh

up: venv  ## serve the bundled model on this machine: gateway, prefill, decode (ARGS="--port 9000 ...")
	@exec $(BIN)/scission serve $(ARGS)

test: venv lint  ## everything that needs no GPU: format, lint, types, import arrows, tests
	$(BIN)/python -m pytest -q -m "not gpu and not multi_gpu" $(ARGS)

test-gpu: venv  ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m "gpu or multi_gpu" $(ARGS)

eval: venv  ## held-out problems through the whole stack and in one process, exact and deployed (ARGS="--problems 100 --tasks add sort")
	@$(BIN)/python -m examples.nano.evaluate $(ARGS)

lint: venv  ## format, lint, types and import arrows, without changing a file
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos:  ## generate code from protos/*.proto
	@bash scripts/make_protos.sh

docs: venv  ## write docs/settings.md and docs/metrics.md from the code
	$(BIN)/python scripts/make_docs.py

clean:  ## remove what make built
	rm -rf .venv .protoc build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
