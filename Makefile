# make demo   set up, build, quantize and run a real language model, print the table (build/demo/report.json, report.png)
# make test   set up, build, run all tests
# make test-triton TRITON=3.9.0   the tests of the Triton kernels with another Triton than requirements.txt's
# make lint   ruff and clang-format
# make bench  measure products, models and quantization beside every rival, draw, and fill the README (20 minutes, 2 cores)
# make bench-products SUFFIX=-avx512   the products alone, on another kind of CPU than the README's: results/products-avx512.md
# make accuracy | ablations | zero-shot   the tables of benchmarks/results/; each goes on where an interrupted run stopped
#                                         (ARGS="--recipes llm-fp4" and the like are passed on)
# make gpu-check   on a machine with a GPU: build for it, test it, time products on it (benchmarks/gpu_check.py)
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
NATIVE := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*.py csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu python_tests/*.cpp python_tests/ptx/*.h \
	python_tests/ptx/*.cpp python_tests/ptx/*/*.cu)

.PHONY: demo test test-triton lint format build clean bench bench-products accuracy ablations zero-shot gpu-check
demo: build
	$(PY) benchmarks/demo.py

# Idle OpenMP threads sleep: spinning ones make small products thousands of times slower beside a busy process.
# Two processes: that of the GPU kernels waits mostly for nvcc, a file at a time.
GPU_TESTS := $(wildcard python_tests/test_cuda_*.py python_tests/test_ptx_*.py python_tests/test_triton_*.py \
	python_tests/test_gpu_rehearsed.py python_tests/test_instruction_forms.py)
test: export OMP_WAIT_POLICY = passive
test: build
	mkdir -p build; $(PY) -m pytest $(GPU_TESTS) >build/test-gpu-kernels.log 2>&1 & kernels=$$!; \
	$(PY) -m pytest python_tests $(GPU_TESTS:%=--ignore=%); rest=$$?; \
	wait $$kernels; kernels=$$?; cat build/test-gpu-kernels.log; exit $$((rest | kernels))

TRITON ?= 3.9.0
test-triton: build build/triton-$(TRITON)
	OMP_WAIT_POLICY=passive PYTHONPATH=$(abspath build/triton-$(TRITON)) $(PY) -m pytest $(wildcard python_tests/test_triton_*.py) $(ARGS)

build/triton-%: $(VENV)/installed
	rm -rf $@ $@.part
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	mv $@.part $@

# What takes part in every shape; the first one is measured with all rivals and recipes.
FEW := --rivals torch-bf16 onednn-int8 torch-int4 onnxruntime-a8 llama.cpp-mxfp4-cpu_repack \
       llama.cpp-q4_0-cpu_repack llama.cpp-q4_0-amx llama.cpp-q4_k-cpu_repack llama.cpp-q4_k-amx \
       --schemes gptq-fp4-a4 gptq-fp4-a8 mxfp4-a8-int nvfp4-a8-int llm-fp4-a16 llm-fp4-a16:bf16
RESULTS := benchmarks/results

PRODUCTS := $(RESULTS)/gemm$(SUFFIX).jsonl

bench bench-products: export OMP_WAIT_POLICY = passive
bench: bench-products
	rm -f $(RESULTS)/model.jsonl $(RESULTS)/quantize.jsonl
	$(PY) benchmarks/model.py --repeats 2 --out $(RESULTS)/model.jsonl
	$(PY) benchmarks/quantize.py --rounds 2 --out $(RESULTS)/quantize.jsonl
	$(PY) benchmarks/plot.py $(RESULTS)/gemm.jsonl 4096x4096
	$(PY) benchmarks/figures.py

bench-products: build $(VENV)/rivals build/ggml/native
	rm -f $(PRODUCTS)
	$(PY) benchmarks/gemm.py --m 1 8 32 128 512 --rounds 5 --out $(PRODUCTS)
	$(PY) benchmarks/gemm.py --shapes 11008x4096 4096x11008 --m 1 8 32 128 $(FEW) --rounds 4 --out $(PRODUCTS)
	$(PY) benchmarks/gemm.py --model smollm2-135m --m 1 32 512 $(FEW) llm-fp4 --rounds 4 --out $(PRODUCTS)
	$(PY) benchmarks/figures.py

$(VENV)/rivals: benchmarks/requirements-rivals.txt $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

build/ggml/native build/ggml/avx2: $(VENV)/installed
	PATH="$(abspath $(VENV))/bin:$$PATH" PYTHON="$(abspath $(PY))" benchmarks/build_ggml.sh $(notdir $@)

accuracy ablations: build
	OMP_WAIT_POLICY=passive $(PY) benchmarks/$@.py $(ARGS)

# On a machine with a GPU and a Python with torch, without network; wheels that are missing there come from .whl/.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

zero-shot: build $(VENV)/zero-shot
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(PY) benchmarks/zero_shot.py $(ARGS)

$(VENV)/zero-shot: benchmarks/requirements-zero-shot.txt $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.txt -r $<
	touch $@

build: $(VENV)/built

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

$(VENV)/installed: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), f'Python 3.10 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# cmake and ninja come from the environment, so no second one is made for the build.
$(VENV)/built: $(VENV)/installed $(NATIVE)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build $(VENV)/built llmfp4_kernels/*.so
