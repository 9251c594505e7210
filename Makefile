# make        sets everything up, executes every notebook at the laptop profile and regenerates every figure
# make test   sets the same up and runs lint and the whole test suite
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
TORCH_INDEX ?=
PROFILE ?= laptop
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
NOTEBOOKS := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/[0-9]*.ipynb))
MODELS := $(wildcard data/models/*.safetensors)
RECORDS := $(wildcard data/records/*.npz data/records/*.tsv data/records/published/*.npz)
PUBLISHED := $(wildcard data/published/*.csv) $(wildcard data/sigmas/*.npz)
LIB := $(wildcard lib/*.py lib/*/*.py)
export PYTHONHASHSEED := 0

all: figures ## set up, execute every notebook at the laptop profile, regenerate every figure (the default)

help: ## what each target does
	@grep -hE '^[a-z0-9<>%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

# The lock is installed as it stands; TORCH_INDEX=<url> adds PyTorch's own index (CPU or CUDA builds).
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 - 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

setup: $(READY) ## the environment alone (.venv, pinned requirements)

figures: build/$(PROFILE)/contents ## every figure and table, from every notebook (PROFILE=smoke|laptop|paper)

# The table of contents of the book.
build/$(PROFILE)/contents: $(NOTEBOOKS:%=build/$(PROFILE)/%.done)
	$(BIN)/python notebooks/run.py contents $(PROFILE)
	@touch $@

build/$(PROFILE)/%.done: notebooks/%.ipynb notebooks/run.py notebooks/lint.py notebooks/profiles/$(PROFILE).yml $(LIB) $(MODELS) $(RECORDS) $(PUBLISHED) $(READY)
	@mkdir -p $(@D)
	$(BIN)/python notebooks/run.py $* $(PROFILE)
	@touch $@

nb-%: ## nb-<name>: one notebook, such as make nb-00_quickstart
	@test -f notebooks/$*.ipynb || { echo "there is no notebooks/$*.ipynb; there are: $(NOTEBOOKS)"; exit 1; }
	@$(MAKE) --no-print-directory build/$(PROFILE)/$*.done

smoke: ## every notebook on little data, in minutes; figures go to build/
	@$(MAKE) --no-print-directory PROFILE=smoke figures

paper: ## every notebook at the papers' settings (a GPU; computes what is not recorded); figures go to build/
	@$(MAKE) --no-print-directory PROFILE=paper figures

test: lint ## lint and the whole test suite
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2

lint: $(READY) ## ruff on modules and notebooks, and the frame of the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python notebooks/lint.py

format: $(READY) ## ruff format and safe fixes; notebooks without outputs, their links to each other
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python notebooks/lint.py --fix

models: $(READY) ## retrain the digits networks of data/experiments.toml
	$(BIN)/python -m lib.zoo models

records: $(READY) ## count the votes of every digits record again, with a progress bar
	$(BIN)/python -m lib.zoo records

cifar10: $(READY) ## CIFAR-10: train, select, record; make cifar10 DATA=<npz, folder or tar.gz> OUT=<folder> [LOSSES="consistency ..."]; hours, stops and resumes
	@test -n "$(DATA)" || { echo "say where CIFAR-10 is: make cifar10 DATA=path/to/cifar-10-python.tar.gz OUT=runs/cifar10"; exit 2; }
	$(BIN)/python -m lib.zoo cifar10 $(DATA) $(if $(LOSSES),$(or $(OUT),data) $(LOSSES),$(OUT))

bench: $(READY) ## the benchmarks: speed and cost, as ratios (an idle machine)
	for name in $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)); do $(BIN)/python -m benchmarks.$$name || exit 1; done

lab: $(READY) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

lock: $(READY) ## pin the environment anew: requirements.txt from pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --extra dev --strip-extras --allow-unsafe --no-emit-find-links --no-emit-index-url --upgrade -o requirements.txt pyproject.toml
	sed -i -E 's/^((torch|torchvision)==[0-9.]+)\+[a-z0-9]+/\1/' requirements.txt

clean: ## remove the environment and everything built (figures stay)
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis *.egg-info

.PHONY: all help setup figures smoke paper test lint format models records cifar10 bench lab lock clean
