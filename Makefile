# make demo: the whole pipeline at toy size.  make test: all tests.  make real: the paper's story with pretrained
# weights (100 MB of download, 8 GiB of memory, about 20 minutes on 2 cores).  Each builds .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo real test lint format bench clean

demo: .venv/.run
	@$(BIN)/python -m demo

real: .venv/.real
	@$(BIN)/python -m demo.real

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Every figure that needs neither a GPU nor another data set; 20 GB of disk and 10 GB of memory.
# benchmarks/README.md has the figures, and the commands for the others.
bench: .venv/.dev
	$(BIN)/python -m benchmarks.data_quality measure --data_path alpaca_data.json \
		--recordings recordings/paper/completions.jsonl,recordings/completions.jsonl \
		--seed_tasks_paths recordings/paper/seed_tasks.jsonl,seed_tasks.jsonl --checks recordings/checks.jsonl
	$(BIN)/python -m benchmarks.dedup run
	$(BIN)/python -m benchmarks.generation run
	$(BIN)/python -m benchmarks.tokenize
	$(BIN)/python -m benchmarks.inference measure
	$(BIN)/python -m benchmarks.train_throughput measure
	$(BIN)/python -m benchmarks.memory count
	$(BIN)/python -m benchmarks.weight_diff run --sizes 0.3B,1.1B --work_dir weight_diff_benchmark

.venv/.run: requirements.txt
	@$(PYTHON) -c "" 2>/dev/null || { echo "error: $(PYTHON) does not run; name a Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m demo check
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { echo "error: this Python has no venv module; on Debian, install python3-venv" >&2; exit 1; }
	@echo "Creating .venv and installing requirements.txt into it; the first time this takes minutes."
	@$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/.real: .venv/.run requirements-real.txt
	$(PIP) -r requirements.txt -r requirements-real.txt
	@touch $@

.venv/.dev: .venv/.run requirements-demo.txt requirements-analysis.txt requirements-real.txt requirements-dev.txt
	$(PIP) -r requirements.txt -r requirements-demo.txt -r requirements-analysis.txt -r requirements-real.txt \
		-r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv demo_output
