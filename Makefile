# Everything happens in .venv, which scripts/setup.sh makes and fills.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: help run test clean

help:
	@echo 'make run    set up, then the quickstart: SGP, SlowMo over SGP, and the two compared'
	@echo 'make test   set up, then the tests'
	@echo 'make clean  remove .venv and what builds and tests leave; runs/ and data/ stay'
	@echo
	@echo 'PYTHON=python3.12 make run   another Python (3.11 or later) than python3; its torch is used if it has one.'
	@echo 'Wheels come from wherever pip is configured to look (pip config, PIP_INDEX_URL, PIP_FIND_LINKS).'

run: .venv/.installed
	$(PY) run.py experiment=quickstart_sgp
	$(PY) run.py experiment=quickstart_slowmo_sgp
	$(PY) scripts/compare.py runs/quickstart_sgp runs/quickstart_slowmo_sgp

test: .venv/.installed
	$(PY) -m pytest

.venv/.installed: pyproject.toml constraints.txt
	PYTHON='$(PYTHON)' scripts/setup.sh
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
