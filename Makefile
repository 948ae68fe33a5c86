# Each target creates .venv first if it is missing. `make PYTHON=python3.12 install` selects the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CUDA := .venv-cuda
SOURCES := $(wildcard pretrain launch tools tests benchmarks)
QUICK := data/quickstart
# One thread per test process: threads of parallel tests would compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
LAUNCH := $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml launch/pretrain.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart dummy test test-slow test-faults test-release test-soak test-fake-cuda gpu check settings clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## create .venv with the project and its dependencies

quickstart: $(QUICK)/stdlib_train.idx $(QUICK)/tasks/docstring.jsonl  ## train on real text on two CPU processes, then generate text (minutes; resumes after an interruption)
	$(LAUNCH) --config configs/quickstart.yaml
	$(BIN)/python launch/generate.py --run runs/quickstart --prompt "def main(" --max-new-tokens 100

dummy: $(INSTALLED)  ## train on random tokens: half a minute that shows a loss without learning
	$(LAUNCH) --config configs/dummy.yaml

test: $(INSTALLED)  ## run the fast tests
	$(PYTEST) -m "not slow and not faults and not release and not soak"

test-slow: $(INSTALLED)  ## run the slow tests, including those of `launch/evaluate.py --tasks`, MLflow and trackio, which it installs
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,dev,eval,trackers,servers]'
	$(PYTEST) -m "slow and not release"

test-release: $(INSTALLED)  ## run the tests of what changes rarely: versions of other libraries, benchmarks, large plans, planted bugs
	$(PYTEST) -m release

test-faults: $(INSTALLED)  ## run the fault tests: kills, power loss, full disks, other engines on other ranks
	$(PYTEST) -m faults

test-soak: $(INSTALLED)  ## faults for half an hour (SOAK_MINUTES), and ten thousand kills: overnight
	$(PYTEST) -m soak -s

test-fake-cuda: $(CUDA)/.installed  ## run the step on fake CUDA tensors, without a GPU (first: 3 GB of downloads into .venv-cuda)
	FAKE_CUDA=1 LD_PRELOAD=$(CUDA)/libcuda.so.1 OMP_NUM_THREADS=1 $(CUDA)/bin/python -m pytest tests/fake_cuda

gpu: $(INSTALLED)  ## measure everything on one GPU, in less than ten minutes: speed, memory, kernels, tests
	$(BIN)/python benchmarks/gpu.py

check: $(INSTALLED)  ## lint, format, spelling and architecture rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m compileall -q $(SOURCES)
	$(BIN)/python -m pytest -q tests/test_house.py

settings: $(INSTALLED)  ## write docs/settings.md and configs/schema.json from the code
	$(BIN)/python tools/write_settings.py

clean:  ## remove caches and build files; keep runs/, data/ and virtual environments
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# pip uses the user's own settings (mirrors, proxies, caches).
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed and $(PYTHON) is " + sys.version.split()[0] + ". Choose one: make PYTHON=python3.12 install")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv; then run make again." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev]'
	@touch $@

# Fake CUDA tensors need the CUDA build of torch, on any machine. `===` takes 2.13.0 and not 2.13.0+cpu where both are offered.
# shim.cpp takes the place of the driver.
$(CUDA)/.installed: setup.py constraints.txt tests/fake_cuda/shim.cpp
	$(PYTHON) -m venv $(CUDA)
	version=$$(sed -n 's/^torch==//p' constraints.txt) && \
	  { $(CUDA)/bin/python -m pip install "torch===$$version" || $(CUDA)/bin/python -m pip install "torch==$$version"; }
	$(CUDA)/bin/python -c 'import sys, torch; torch.version.cuda or sys.exit("pip took a CPU build of torch: its indexes must offer the CUDA build, too")'
	$(CUDA)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	$(CXX) -std=c++17 -shared -fPIC -Wl,-soname,libcuda.so.1 -o $(CUDA)/libcuda.so.1 tests/fake_cuda/shim.cpp
	@touch $@

$(QUICK)/tokenizer/tokenizer.json: | $(INSTALLED)
	$(BIN)/python tools/train_tokenizer.py --input stdlib --output $(QUICK)/tokenizer --vocab-size 4096

$(QUICK)/stdlib_train.idx: $(QUICK)/tokenizer/tokenizer.json
	$(BIN)/python tools/tokenize_corpus.py --input stdlib --tokenizer $(QUICK)/tokenizer --output $(QUICK)/stdlib --valid-fraction 0.02

# The task that is written last.
$(QUICK)/tasks/docstring.jsonl: $(QUICK)/stdlib_train.idx
	$(BIN)/python tools/make_tasks.py --data $(QUICK)/stdlib_valid --tokenizer $(QUICK)/tokenizer --output $(QUICK)/tasks
