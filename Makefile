# make demo: the whole story at toy size.  make test: the whole suite.  Both build .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench clean

demo: $(VENV)/.run
	@$(BIN)/python demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)/.run: requirements.txt
	@$(PYTHON) demo.py check
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-demo.txt requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-demo.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) demo_output
