# `make demo` and `make test` first create a virtual environment, so they work on a new machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread per process: more threads hardly help small models, and are slow when other processes use the cores.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow test-fuzz test-app bundle quality setup clean

setup: $(VENV)/.ready

# torch is installed first, so that the other packages do not install another version of it.
$(VENV)/.ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py --overwrite

test: setup
	$(PYTEST) -n 2

# Gradio needs Pillow below 13. Its resizing differs from the version that the golden data were recorded with. The other
# packages are those of the first environment, so that they are not installed twice.
$(VENV)-app/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)-app
	grep -v '^pillow==' constraints.txt > $(VENV)-app/constraints.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(echo $(VENV)-app/lib/python3*/site-packages)/first-environment.pth
	$(VENV)-app/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-app/constraints.txt \
		-e '.[app,eval]' pytest hypothesis playwright
	touch $@

test-app: $(VENV)-app/.ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-app/bin/python -m pytest tests/examples/test_app.py

test-slow: setup
	$(PYTEST) -m slow -s

# Many damaged files, invalid arguments and killed programs; part of `make test-slow`.
test-fuzz: setup
	$(PYTEST) -m slow -s -n 2 tests/datasets/test_fuzzed_annotations.py tests/test_damaged_pictures.py \
		tests/test_pipeline_arguments.py tests/test_conversion_fuzz.py tests/examples/test_damaged_models.py \
		tests/test_killed.py

# The files that the CUDA acceptance run needs besides a checkout. On a machine with a GPU: bash build/cuda/run.sh
bundle: setup
	$(BIN)/python tests/cuda/bundle.py --output build/cuda

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-app build dist src/*.egg-info
