# Two commands for people, `make quickstart` and `make test`; `make help` lists the rest.
PY := .venv/bin/python
JOBS := 2

.DEFAULT_GOAL := help
.PHONY: help env quickstart test lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make or mend .venv (PYTHON=/path/to/python3.12 chooses the interpreter)
	@scripts/setup_env.sh

quickstart: env  ## text -> reverse model -> earlier text and a reranked answer, on this machine; ARGS="--help" lists its options
	@$(PY) examples/quickstart/quickstart.py $(ARGS)

test: env lint  ## every check that continuous integration runs; ARGS="-k direction" selects tests, JOBS=0 uses one process
	-@scripts/ensure_slurm.sh  # without a Slurm the tests of examples/slurm fail, and only those
	@$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: env  ## formatter, linter, type checker
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: env  ## rewrite files in the project's style
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean:  ## remove caches and build products; keeps .venv and runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
