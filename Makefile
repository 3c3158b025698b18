# Two commands, each doing everything on a fresh machine with Python 3.11 (or later) and make:
#   make demo    synthesise the embedded corpus, train CPC-CTC on it, show what was learned
#   make test    the linter and all tests
PYTHON ?= python3
DEMO ?= demo
RUN = .venv/bin/python

.PHONY: demo test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

test: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m pytest

clean:
	rm -rf .venv $(DEMO)
