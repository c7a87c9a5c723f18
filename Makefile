# `make test` needs Python 3.11 to 3.13 and nothing else: it makes .venv, installs everything, and runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CODE = ivcr_jax configs tfds_builder tests setup.py
export TF_CPP_MIN_LOG_LEVEL = 3

.PHONY: install test test-full lint format sample benchmark learning clean

install: $(VENV)/installed

$(VENV)/installed: setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13) and f"Python {v.major}.{v.minor} found; expected 3.11 to 3.13: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[build,convert,dev,eval]'
	touch $@

test: install lint
	$(BIN)/python -m pytest -n 2 --durations=10 -m "not full"

test-full: install
	$(BIN)/python -m pytest --durations=10 -m full

lint: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy ivcr_jax configs tfds_builder tests/benchmarks/learning.py tests/benchmarks/run.py

format: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

sample: install
	$(BIN)/python -m ivcr_jax.data.synth --out=data/source --videos=60 --interactions=200
	$(BIN)/python -m tfds_builder.build --dataset=ivcr200k --manual_dir=data/source --data_dir=data
	$(BIN)/python -m tfds_builder.build --dataset=ivcr200k_videos --manual_dir=data/source --data_dir=data --frames=16 --size=96
	$(BIN)/python -m ivcr_jax.data.pipeline --dialogues=data/ivcr200k --videos=data/ivcr200k_videos

benchmark: install
	$(BIN)/python -m tests.benchmarks.run

learning: install
	$(BIN)/python -m tests.benchmarks.learning --out=build/learning

clean:
	rm -rf $(VENV) build *.egg-info
