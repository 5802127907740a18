# make demo   set up, build, quantize and run a real language model, print the table (build/demo/report.json, report.png)
# make test   set up, build, run all tests
# make lint   ruff and clang-format
# make accuracy | ablations | zero-shot   the tables of benchmarks/results/; each goes on where an interrupted run stopped
#                                         (ARGS="--recipes llm-fp4" and the like are passed on)
# make gpu-check   on a machine with a GPU: build for it, test it (benchmarks/gpu_check.py)
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
NATIVE := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.py csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu python_tests/ptx/*.h \
	python_tests/ptx/*.cpp python_tests/ptx/*/*.cu)

.PHONY: demo test lint format build clean accuracy ablations zero-shot gpu-check
demo: build
	$(PY) benchmarks/demo.py

# Idle OpenMP threads sleep: spinning ones make small products thousands of times slower beside a busy process.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest python_tests

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
