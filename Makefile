# `make run` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run report test notebook docs site lint format clean

run: $(VENV)/installed
	$(BIN)/python run_exp.py -m init=lora,pissa,lora_ga,lora_one

# The embedded sweep (what is finished is not repeated), its tables, plots and report.html.
report: run
	$(BIN)/python -m lora_one.reports results

# Two files of tests at a time, on one thread each, in the order of tests/conftest.py.
test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Toy_Experiments.ipynb from top to bottom, in place; its pictures also in results/figures.
notebook: $(VENV)/installed
	OMP_NUM_THREADS=1 LORA_ONE_FIGURES=results/figures $(BIN)/python -m nbconvert \
		--to notebook --execute --inplace --ExecutePreprocessor.timeout=900 \
		--ExecutePreprocessor.record_timing=False Toy_Experiments.ipynb

# docs/configuration.md from the schema and conf/.
docs: $(VENV)/installed
	$(BIN)/python scripts/config_reference.py

# README.md and docs/ as a site in site/; a link that leads nowhere is an error.
site: docs
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) results site
