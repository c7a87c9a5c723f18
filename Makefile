# Python 3.11 to 3.13 and make are all that is needed: everything else is installed into .venv.
#   make demo [VIDEOS=DIR [ANNOTATIONS=FILE]]   the whole of it on this machine, in a quarter of an hour
#   make test                                   every check
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CODE = ivcr_jax configs tfds_builder launch tests setup.py
export TF_CPP_MIN_LOG_LEVEL = 3

# What went wrong is said in one sentence, above which pip says more.
NO_INSTALL = { echo "make: installing failed; it needs a network and 3 GB of disk (the tests 6): see to them, and give the same command again" >&2; exit 1; }
STOPPABLE = trap 'echo "make: stopped; the same command goes on from here" >&2; exit 130' INT;
NO_PYTHON = { echo "make: expected Python 3.11 to 3.13; name one that is there: make PYTHON=python3.11" >&2; exit 1; }

.PHONY: install demo test test-full lint format sample benchmark learning clean

install: $(VENV)/installed

$(VENV)/installed: $(VENV)/light
	@echo "installing into $(VENV) what building, converting and the tests need"
	@$(STOPPABLE) $(BIN)/pip install --quiet --editable '.[build,convert,dev,eval]' || $(NO_INSTALL)
	@touch $@

# What converting, TFDS's own builds and tests need is 3 GB more.
$(VENV)/light: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and "make: found Python %d.%d" % v)' || $(NO_PYTHON)
	@echo "installing into $(VENV)"
	@$(STOPPABLE) $(PYTHON) -m venv $(VENV) || $(NO_INSTALL)
	@$(STOPPABLE) $(BIN)/pip install --quiet --upgrade pip || $(NO_INSTALL)
	@$(STOPPABLE) $(BIN)/pip install --quiet --editable '.[eval]' || $(NO_INSTALL)
	@touch $@

demo: $(VENV)/light
	@$(BIN)/python -m launch.demo --out=build/demo$(if $(VIDEOS),-own --videos="$(VIDEOS)")$(if $(ANNOTATIONS), --annotations="$(ANNOTATIONS)")

test: install lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 -m "not full"

test-full: install
	$(BIN)/python -m pytest --durations=10 -m full

lint: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy ivcr_jax configs tfds_builder launch tests/benchmarks/learning.py tests/benchmarks/run.py

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
