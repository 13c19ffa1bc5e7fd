# kd: everything from a fresh clone. Needs python3 (3.10 or later) with pip, make and git.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV ?= $(shell command -v uv || echo .uv/bin/uv)
PY := .venv/bin/python
STAMP := .venv/.installed
# the machine's own certificates, which know of a company's proxy
export UV_NATIVE_TLS := true
export UV_SYSTEM_CERTS := true
ARGS ?=

.PHONY: help install demo format lint test bench sweep-teacher-quality sweep-cross-architecture search report lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-26s %s\n", $$1, $$2}'

.uv/bin/uv:
	$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml requirements.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	VIRTUAL_ENV=.venv $(UV) pip install --quiet -r requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --no-deps -e .
	@touch $@

install: $(STAMP)  ## make .venv with everything (the other targets do it themselves)

demo: $(STAMP)  ## teacher, student alone, student distilled on real digits: a table and a picture
	$(PY) scripts/demo.py $(ARGS)

format: $(STAMP)  ## format the code
	.venv/bin/ruff check --fix-only --quiet . ; .venv/bin/ruff format .

lint: $(STAMP)  ## check the code's form
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

test: $(STAMP)  ## run the tests (ARGS="-k loop" for some of them)
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

bench: $(STAMP)  ## our training step against the textbook's (OUT=bench.json)
	$(PY) scripts/bench/run.py $(if $(OUT),out=$(OUT)) $(ARGS)

sweep-teacher-quality: $(STAMP)  ## does a better teacher make a better student?
	$(PY) -m kd.train -m +sweep=teacher_quality $(ARGS)

sweep-cross-architecture: $(STAMP)  ## does it matter that teacher and student differ in kind?
	$(PY) -m kd.train -m +sweep=cross_architecture $(ARGS)

search: $(STAMP)  ## Optuna over the distillation hyperparameters
	$(PY) -m kd.train -m +search=distill $(ARGS)

report: $(STAMP)  ## what all those runs say: tables, plots, one HTML page
	$(PY) -m kd.report $(ARGS)

lock: .uv/bin/uv  ## pin the versions again
	.uv/bin/uv pip compile pyproject.toml --all-extras --universal --no-emit-index-url --no-annotate --no-header --python-version 3.10 -o requirements.lock

clean:  ## remove what can be made again (not runs/)
	rm -rf .venv .uv .pytest_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
