# make install | run | schedule | unschedule | test | lint | bench | soak | ui
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# The first Python that runs; 3.11 leads because the constraints were tested on it.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c 'import ensurepip' 2> /dev/null && echo python$$v && break; done)

# uv does not read pip's settings: pass on where pip was told to look, unless uv was told itself.
comma := ,
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
# like pip, take the best version of any index
export UV_INDEX_STRATEGY ?= unsafe-best-match
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(PIP_FIND_LINKS)))
endif
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

# An environment that was moved or copied with its folder still runs what is in the old folder: it is made anew.
# (One that is a link is shared on purpose.)
ifneq ($(shell test ! -L $(VENV) && test -e $(BIN)/ldm && ! head -n 3 $(BIN)/ldm | grep -qF "$$(pwd -P)/$(VENV)/" && echo moved),)
.PHONY: $(BIN)/python $(VENV)/.run $(VENV)/.test
endif

.PHONY: install run schedule unschedule test soak lint bench ui
install: $(VENV)/.run  ## what `make run` needs

$(BIN)/python:
	$(or $(PYTHON),$(error no Python 3.11, 3.12 or 3.13 found; choose one: make install PYTHON=/path/to/python)) -m venv --clear $(VENV)

# Two stamps: .run stands for the package and its dependencies, .test for these and the test extra.
# Python compiles what it imports once; where it may not write bytecode, uv compiles everything now.
$(VENV)/.test: EXTRA := [test]
$(VENV)/.run $(VENV)/.test: pyproject.toml infra/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt uv
	uv pip install $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) --python $(BIN)/python \
	  --constraint infra/constraints.txt --editable '.$(EXTRA)'
	touch $(VENV)/.run $@

run: $(VENV)/.run     ## images to a registered champion, once, here
	ldm run

test: $(VENV)/.test   ## everything but the long loops, in three processes, as many of them wait
	OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not soak"

soak: $(VENV)/.test   ## the long loops
	python -m pytest -m soak

lint: $(VENV)/.test   ## style, types, layers, and that the constraints resolve for each Python
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	uv pip check --python $(BIN)/python
	for v in 3.11 3.12 3.13; do \
	  uv pip compile --quiet --python-version $$v --extra test --constraint infra/constraints.txt pyproject.toml > /dev/null || exit 1; done

bench: $(VENV)/.test  ## speed as ratios against peers; see tests/benchmarks
	OMP_NUM_THREADS=$$(nproc) python -m pytest tests/benchmarks -o addopts="--import-mode=importlib -s" -o timeout=0

schedule: $(VENV)/.run    ## run by itself what infra/prefect.yaml says, in the background: Prefect server, worker, deployments
	python -m flows.schedule start

unschedule: $(VENV)/.run  ## end all of that; a training stops at a checkpoint
	python -m flows.schedule stop

ui: $(VENV)/.run          ## MLflow at http://127.0.0.1:5000, Prefect at http://127.0.0.1:4200; ctrl-C ends both
	export DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false; \
	trap 'trap - INT TERM; kill 0' INT TERM; mlflow ui --port 5000 & python -m flows.server & wait
