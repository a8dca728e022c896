# Each target sets up what it needs; `make` lists them. PYTHON=... chooses an interpreter: one that has all that pyproject.toml's extras
# build and test ask for is used as it is (a machine without network), otherwise .venv is made. JOBS=... is how many tests run at once.
.DEFAULT_GOAL := help
PYTHON ?= python3
TORCH  ?= torch==2.13.0
HAVE   := $(shell $(PYTHON) -c "import torch" 2>/dev/null && $(PYTHON) .ci/requirements.py --have build test 2>/dev/null && echo yes)
ifeq ($(HAVE),yes)
PY    := $(PYTHON)
SETUP :=
else
PY    := .venv/bin/python
SETUP := .venv/ready
endif
ifneq ($(wildcard /usr/local/cuda/include/cuda_runtime.h),)
export CUDA_HOME ?= /usr/local/cuda
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
OUT     ?= runs/demo

JOBS    ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))")
# With the .venv, tests run in JOBS processes of one thread each, a file of tests in one of them; the slowest are named at the end.
TESTS   := $(if $(SETUP),OMP_NUM_THREADS=1 )$(PY) -m pytest --durations=15 --durations-min=5 $(if $(SETUP),-n $(JOBS) --dist loadfile)
SPREAD  := $(subst loadfile,worksteal,$(TESTS))
COVER   := $(if $(SETUP),--cov=fastif --cov-report=term:skip-covered --cov-fail-under=95)

.PHONY: help demo test test-slow lint docs bench bench-kcenter bench-influence bench-index bench-ranks bench-blocks results cuda-check cuda-link arm-check \
  memory-check gpu-check wheel clean

help:  ## this list
	@echo "make TARGET, each of which sets up what it needs:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{ printf "%-18s%s\n", $$1, $$2 }'

demo: build/ready  ## remove each class of the digits from a small CNN, compare samplers with retraining, a minute
	$(PY) -m fastif class-removal --out $(OUT)

test: build/ready $(if $(SETUP),.venv/test)  ## the tests, but for the slow ones
	@echo "tests$(if $(SETUP), in $(JOBS) processes): a dot each"
	$(TESTS) -m "not slow" $(COVER) fastif tests

test-slow: build/ready $(if $(SETUP),.venv/test)  ## the tests that compile, install or kill: emulated CUDA kernels, packages, jobs
	$(SPREAD) -m slow tests

lint: .venv/lint  ## ruff, pyright and clang-format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/emulator/*.* tests/ops/*.cpp))

docs: build/ready $(if $(SETUP),.venv/docs)  ## the documentation site, build/docs/index.html; warnings are errors
	$(PY) -m sphinx -q -E -a -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

bench: build/ready  ## verify, then time every op against its peers, some minutes
	@mkdir -p runs
	$(PY) -m pytest benchmarks/ops/bench_farthest_first.py benchmarks/ops/bench_ggn_block.py benchmarks/ops/bench_per_sample_grad.py \
	  --benchmark-enable -s --benchmark-json runs/bench.json
	$(PY) -m benchmarks.figures.keep keep runs/bench.json cpu
	$(PY) -m benchmarks.figures.keep tables

bench-kcenter: build/ready  ## every k-center peer, growth with n, d and k, 10 minutes; FASTIF_DATA=folder
	@mkdir -p runs
	FASTIF_BENCH=all $(PY) -m pytest benchmarks/ops/bench_farthest_first.py -k kcenter --benchmark-enable -s \
	  --benchmark-json runs/kcenter.json
	$(PY) -m benchmarks.figures.keep keep runs/kcenter.json kcenter-cpu
	$(PY) -m benchmarks.figures.keep tables

bench-influence: build/ready  ## EK-FAC against kronfluence and dattri, growth with n, q and width; FASTIF_DATA=folder
	@mkdir -p runs
	OMP_NUM_THREADS=1 FASTIF_BENCH_SCALE=$${FASTIF_BENCH_SCALE:-0.2} $(PY) -m pytest benchmarks/influence/bench_influence.py --benchmark-enable -s --benchmark-json runs/influence.json
	$(PY) -m benchmarks.figures.keep keep runs/influence.json influence-cpu
	$(PY) -m benchmarks.figures.keep tables

bench-ranks: build/ready  ## EK-FAC on 1, 2 and 4 ranks: CPU seconds in all, bytes sent; FASTIF_DATA=folder
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.influence.bench_ranks --out runs/ranks.json
	$(PY) -m benchmarks.figures.keep keep runs/ranks.json ranks-cpu
	$(PY) -m benchmarks.figures.keep tables

bench-index: build/ready  ## the index against walking again: seconds, bytes, what is lost; FASTIF_DATA=folder, FASTIF_BENCH=large for larger models, growth for a million examples
	@mkdir -p runs
	OMP_NUM_THREADS=1 FASTIF_BENCH_SCALE=$${FASTIF_BENCH_SCALE:-0.2} $(PY) -m pytest benchmarks/influence/bench_index.py --benchmark-enable -s --benchmark-json runs/index.json
	$(PY) -m benchmarks.figures.keep keep runs/index.json index$${FASTIF_BENCH:+-$$FASTIF_BENCH}-cpu
	$(PY) -m benchmarks.figures.keep tables

bench-blocks: build/ready  ## exact blocks and their factors, whole sizes, against torch, torch.func and curvlinops; FASTIF_DATA=folder
	@mkdir -p runs
	FASTIF_BENCH=all $(PY) -m pytest benchmarks/ops/bench_ggn_block.py benchmarks/ops/bench_cholesky.py --benchmark-enable -s \
	  --benchmark-json runs/blocks.json
	$(PY) -m benchmarks.figures.keep keep runs/blocks.json blocks-cpu
	$(PY) -m benchmarks.figures.keep tables

results: bench  ## the tables of class removal and of make bench from scratch, about an hour: make results DATA=folder-with-fashion-mnist
	$(PY) -m fastif class-removal --k 5% --seeds 10 --out runs/digits
	$(PY) -m fastif class-removal --data fashion-mnist --root $(DATA) --k 0.5%,1% --seeds 10 --out runs/fashion-mnist
	$(PY) -m benchmarks.figures.keep keep runs/digits/results.json class-removal-digits
	$(PY) -m benchmarks.figures.keep keep runs/fashion-mnist/results.json class-removal-fashion-mnist
	$(PY) -m benchmarks.figures.keep tables

zoo: build/ready $(if $(SETUP),.venv/test)  ## one try for each of about 90 networks, against autograd example by example
	@mkdir -p runs
	cp benchmarks/results/zoo.json runs/zoo.json  # timm's and torchvision's networks are of an environment of their own
	$(PY) -m benchmarks.experiments.zoo --add --out runs/zoo.json
	$(PY) -m benchmarks.figures.keep keep runs/zoo.json zoo
	$(PY) -m benchmarks.figures.keep tables

cuda-check: $(SETUP)  ## compile every CUDA source; needs nvcc, no GPU
	PY=$(PY) bash csrc/check_cuda.sh

cuda-link:  ## before a release: build, link and import for CUDA without a GPU, several GB and minutes
	PYTHON=$(PYTHON) bash csrc/link_cuda.sh

wheel: .venv/test  ## the wheel for every torch from 2.11 on; TRY="python ..." to try it with others than the .venv
	.venv/bin/pip install -q $$(.venv/bin/python .ci/requirements.py --alone wheel)
	PY=.venv/bin/python bash csrc/build_wheel.sh

arm-check: .venv/ready  ## compile every CPU source for 64-bit ARM
	.venv/bin/pip install -q $$(.venv/bin/python .ci/requirements.py --alone arm)
	PY=.venv/bin/python sh csrc/check_arm.sh

memory-check: .venv/test  ## the ops' tests and 100,000 spoiled calls with AddressSanitizer watching; FASTIF_FUZZ=calls
	PY=.venv/bin/python sh csrc/check_memory.sh

gpu-check: $(SETUP)  ## on a machine with a GPU: build, test, sanitize, benchmark, write one JSON
	$(PY) benchmarks/gpu_check.py

clean:  ## remove what was built, and the .venv
	rm -rf build fastif/_C*.so fastif/_memory*.so .venv .venv-cuda

build/ready: $(SOURCES) $(SETUP)
	@mkdir -p build
	@echo "compiling the extension, a minute"
	$(PY) setup.py -q build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
	@$(PY) -c "import fastif; print('built', fastif.build_info())"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What an extra asks for: dependencies are named in pyproject.toml alone.
INSTALL = .venv/bin/python .ci/requirements.py $(1) > .venv/requirements.txt && .venv/bin/pip install -q $(TORCH) -r .venv/requirements.txt

.venv/ready: pyproject.toml .ci/requirements.py | .venv/bin/python
	@echo "torch and the packages for .venv: some minutes, most of it download"
	@$(call INSTALL,build test)
	@touch $@

.venv/test: .venv/ready
	@echo "what the tests compare with, for .venv"
	@$(call INSTALL,check oracles)
	@.venv/bin/python .ci/requirements.py --alone oracles-alone > .venv/requirements.txt && .venv/bin/pip install -q --no-deps -r .venv/requirements.txt
	@touch $@

.venv/lint: .venv/ready
	@$(call INSTALL,lint)
	@touch $@

.venv/docs: .venv/ready
	@$(call INSTALL,docs)
	@touch $@
