# make quickstart     fine-tune a tiny GLA and a tiny Mamba on the CPU
# make test           lint, types and tests without a GPU; make test-all runs the others
# make test-parallel  two to four processes under DDP, ZeRO and FSDP2, on the CPU
# make test-faults    kills, damaged files and full disks; test-faults-full: a run at every point
# make test-slurm     jobs on a real Slurm, started for the tests where it is installed
# make test-all       what is no part of make test, and needs no GPU
# make test-gpu       the tests that need a GPU, on a machine with one
# make fuzz           some 20,000 made-up inputs, others each time; `make test` tries 4,000
# make matrix         write docs/support_matrix.md, or MATRIX_OUT, from its tests
#
# All make .venv once and reuse it. Variables:
#   PYTHON       interpreter for .venv (3.11 to 3.13); one that already has torch lends it to .venv
#   TORCH        what to install as torch when there is none
#   TORCH_INDEX  package index for torch alone, e.g. one with CPU-only builds
PYTHON ?= python3
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
TORCH_INDEX ?=
MATRIX_OUT ?= docs/support_matrix.md
RUN := .venv/bin/python

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait without spinning: on busy cores a spinning one takes the other's time.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test test-unit test-parallel test-slurm test-faults test-faults-full test-all \
    test-gpu test-oldest-peft matrix fuzz lint clean help

help:
	@sed -n '/^#/!q; s/^# \?//p' Makefile

quickstart: .venv/installed
	@$(RUN) train.py --cfg cfg/quickstart/gla_lora.yaml --overwrite
	@$(RUN) train.py --cfg cfg/quickstart/mamba_lora.yaml --overwrite

test: lint
	@echo "== tests without a GPU (the others: make test-all)"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests --ignore tests/parallel --ignore tests/slurm \
	    --ignore tests/faults -n auto --dist loadfile --durations=10

test-unit: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests/unit -n auto --dist loadfile

test-parallel: .venv/installed-deepspeed
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests/parallel --durations=10

test-faults: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests/faults -m "not every_point" --durations=10

test-faults-full: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(RUN) -m pytest tests/faults --durations=10

test-all: test-parallel test-slurm test-faults

test-gpu: .venv/installed-dev
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	    f"make test-gpu needs a CUDA GPU, and torch {torch.__version__} sees none")'
	@$(RUN) -m pytest -m gpu --one-config tests/numerics tests/integration --durations=10

test-slurm: .venv/installed-deepspeed
	@$(RUN) -m pytest tests/slurm --durations=10

# The PEFT of .venv is the newest that pyproject.toml allows; this is the oldest.
test-oldest-peft: .venv/installed-dev
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target build/oldest-peft "peft==$$(sed -n 's/.*"peft>=\([0-9.]*\),.*/\1/p' pyproject.toml)"
	@PYTHONPATH=build/oldest-peft OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile \
	    tests/integration/test_peft_*.py tests/integration/test_adapter_roundtrip.py \
	    tests/integration/test_sd_lora_runs.py

matrix: .venv/installed-dev
	@MATRIX_OUT=$(MATRIX_OUT) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/integration/test_peft_matrix.py

fuzz: .venv/installed-dev
	@SSM_TRAIN_FUZZ=6 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/fuzz

lint: .venv/installed-dev
	@echo "== ruff and mypy"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# A torch that is already there, in PYTHON or in .venv, is kept: the build that suits the machine
# is the user's choice, and a plain requirement would replace it by several GB of CUDA.
.venv/torch:
	@echo "== making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	    sys.exit(None if ok else "ssm_train needs Python 3.11 to 3.13; set PYTHON=")'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    echo "== using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv; fi
	@$(RUN) -c 'import torch' 2>/dev/null || { echo "== installing $(TORCH)"; \
	    $(RUN) -m pip install --quiet --disable-pip-version-check \
	        $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'; }
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "== installing ssm_train and what it needs (about two minutes, once)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

# Its kernels are built where they are first used.
.venv/installed-deepspeed: .venv/installed-dev
	@echo "== installing DeepSpeed"
	@DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --disable-pip-version-check -e '.[deepspeed]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "== installing the test tools"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
