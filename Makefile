# make install | run | test | lint | bench | soak | ui
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install run test soak lint bench ui
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[test]'
	touch $@

run: install          ## images to a registered champion, once, here
	ldm run

test: install         ## everything but the long loops, on two processes
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak"

soak: install         ## the long loops
	python -m pytest -m soak

lint: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports

bench: install        ## speed as ratios against peers; see tests/benchmarks
	OMP_NUM_THREADS=$$(nproc) python -m pytest tests/benchmarks -o addopts="--import-mode=importlib -s" -o timeout=0

ui: install           ## MLflow at http://127.0.0.1:5000, Prefect at http://127.0.0.1:4200; ctrl-C ends both
	trap 'kill 0' INT TERM; mlflow ui --port 5000 & prefect server start & wait
