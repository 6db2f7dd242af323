# One line a task. Each sets up what it needs (scripts/setup); `make` alone lists them.

PY := .venv/bin/python

.PHONY: help setup run test lint bench soak docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## make .venv with blocklayer and its tools (the others do it when needed)
	@scripts/setup

run: setup ## the tour: a real disk through snapshots, commit, rebase and convert
	$(PY) -m blocklayer.cli.main tour

test: lint ## everything CI holds: lint, types, floors, and all tests but soak
	$(PY) -m pytest -n auto --hypothesis-profile=ci

lint: setup ## ruff, mypy --strict, the floors
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup ## speed, as ratios against qemu-img and qemu-io in the same run
	$(PY) -m bench

soak: setup ## the long property-based and crash tests
	$(PY) -m pytest -n auto -m "soak or hypothesis" --hypothesis-profile=soak

docs: setup ## write docs/reference.md from the declarations
	$(PY) scripts/docs

clean: ## remove what the targets made
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
