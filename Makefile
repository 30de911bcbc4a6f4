# Everything happens in .venv, which scripts/setup.sh makes and fills.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: help run test lint docs clean

help:
	@echo 'make run    set up, then the quickstart: Local SGD without and with SlowMo, and the two compared'
	@echo 'make test   set up what the tests need besides, then the tests'
	@echo 'make lint   ruff, codespell and mypy'
	@echo 'make docs   the documentation as a site, in site/'
	@echo 'make clean  remove .venv and what builds and tests leave; runs/ and data/ stay'
	@echo
	@echo 'PYTHON=python3.12 make run   another Python (3.11 or later) than python3; its torch is used if it has one.'
	@echo 'Wheels come from wherever pip is configured to look (pip config, PIP_INDEX_URL, PIP_FIND_LINKS).'

# memory in huge pages: 15% quicker on CPUs
run: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
run: .venv/.installed
	$(PY) scripts/quickstart.py

test: .venv/.installed-test
	$(PY) -m pytest

lint: .venv/.installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/codespell
	.venv/bin/mypy

docs: .venv/.installed-test
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# everything for the tests is more than what a run needs
.venv/.installed: pyproject.toml constraints.txt
	@[ .venv/.installed-test -nt pyproject.toml ] && [ .venv/.installed-test -nt constraints.txt ] || PYTHON='$(PYTHON)' scripts/setup.sh run
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	PYTHON='$(PYTHON)' scripts/setup.sh test
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
