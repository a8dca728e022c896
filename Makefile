# make demo · test · lint · bench · cuda-check · arm-check · gpu-check: each sets up what it needs.
# PYTHON=... chooses an interpreter. One that already imports everything below is used as it is (a machine without network);
# otherwise .venv is made.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
NEEDS  := torch numpy tqdm sklearn matplotlib typer rich safetensors pytest pytest_benchmark hypothesis
HAVE   := $(shell $(PYTHON) -c "$(foreach module,$(NEEDS),import $(module);)" 2>/dev/null && echo yes)
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

.PHONY: demo test test-slow lint bench bench-kcenter bench-influence bench-blocks results cuda-check cuda-link arm-check gpu-check clean

demo: build/ready  ## remove each class of the digits from a small CNN, compare samplers with retraining
	$(PY) -m fastif class-removal --out $(OUT)

test: build/ready $(if $(SETUP),.venv/test)
	$(PY) -m pytest -m "not slow" $(if $(SETUP),--cov=fastif --cov-report=term:skip-covered --cov-fail-under=95) fastif tests

test-slow: build/ready $(if $(SETUP),.venv/test)  ## what compiles or installs something
	$(PY) -m pytest -m slow tests

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/emulator/*.* tests/ops/*.cpp))

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

bench-blocks: build/ready  ## exact blocks and their factors, whole sizes, against torch, torch.func and curvlinops; FASTIF_DATA=folder
	@mkdir -p runs
	FASTIF_BENCH=all $(PY) -m pytest benchmarks/ops/bench_ggn_block.py benchmarks/ops/bench_cholesky.py --benchmark-enable -s \
	  --benchmark-json runs/blocks.json
	$(PY) -m benchmarks.figures.keep keep runs/blocks.json blocks-cpu
	$(PY) -m benchmarks.figures.keep tables

results: bench  ## README's tables from scratch, about an hour: make results DATA=folder-with-fashion-mnist
	$(PY) -m fastif class-removal --k 5% --seeds 10 --out runs/digits
	$(PY) -m fastif class-removal --data fashion-mnist --root $(DATA) --k 0.5%,1% --seeds 10 --out runs/fashion-mnist
	$(PY) -m benchmarks.figures.keep keep runs/digits/results.json class-removal-digits
	$(PY) -m benchmarks.figures.keep keep runs/fashion-mnist/results.json class-removal-fashion-mnist
	$(PY) -m benchmarks.figures.keep tables

cuda-check: $(SETUP)  ## compile every CUDA source; needs nvcc, no GPU
	PY=$(PY) bash csrc/check_cuda.sh

cuda-link:  ## before a release: build, link and import for CUDA without a GPU, several GB and minutes
	PYTHON=$(PYTHON) bash csrc/link_cuda.sh

arm-check: .venv/ready  ## compile every CPU source for 64-bit ARM
	.venv/bin/pip install -q ziglang
	PY=.venv/bin/python sh csrc/check_arm.sh

gpu-check: $(SETUP)  ## on a machine with a GPU: build, test, sanitize, benchmark, write one JSON
	$(PY) benchmarks/gpu_check.py

clean:
	rm -rf build fastif/_C*.so .venv .venv-cuda

build/ready: $(SOURCES) $(SETUP)
	@mkdir -p build
	$(PY) setup.py -q build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
	@$(PY) -c "import fastif; print('built', fastif.build_info())"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: Makefile | .venv/bin/python
	.venv/bin/pip install -q $(TORCH) "setuptools>=77" ninja numpy tqdm "filelock>=3.24" scikit-learn matplotlib typer rich safetensors \
	  pytest pytest-benchmark hypothesis
	@touch $@

.venv/test: .venv/ready
	.venv/bin/pip install -q $(TORCH) pytest-cov scipy einops einconv opt-einsum linear_operator accelerate transformers opacus==1.6.0
	@# Without dependencies: they ask for torchvision and use none of it here; one built for another torch breaks transformers.
	.venv/bin/pip install -q --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch unfoldNd kronfluence==1.0.1 dattri==0.3.0 captum==0.9.0 \
	  laplace-torch==0.3 asdfghjkl==0.1a4 torchmetrics==1.9.0 lightning-utilities==0.15.3
	@touch $@

.venv/lint: .venv/ready
	.venv/bin/pip install -q ruff==0.17.6 pyright==1.1.414 clang-format==23.1.5
	@touch $@
