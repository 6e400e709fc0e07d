# Thin: each target makes its own .venv first. PYTHON picks the interpreter that the venv is made with.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test lint format bench slow slurm

demo: .venv/installed
	$(RUN) -m mmtrain fit -c configs/rankclip_emoji.yaml

# A file a core; with one thread each they do not get in each other's way.
test: .venv/installed lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile

slow: .venv/installed
	$(RUN) -m pytest -m slow --timeout 3000

# A real Slurm on this machine, as the present user; Debian: apt-get install slurm-wlm munge
slurm: .venv/installed
	$(RUN) -m pytest -m slurm tests/test_slurm.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/installed
	$(RUN) -m tests.benchmarks.list_loss
	$(RUN) -m tests.benchmarks.loader
	$(RUN) -m tests.benchmarks.retrieval
	$(RUN) -m tests.benchmarks.episodes
	$(RUN) -m tests.benchmarks.fast_step
	$(RUN) -m tests.benchmarks.slow_step
	$(RUN) -m tests.benchmarks.foley_sampling
	$(RUN) -m tests.benchmarks.guided_attention

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmtrain needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -e '.[dev]'
	touch $@
