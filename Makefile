# make demo | test | docs | bench | accuracy | ablations: each sets up .venv by itself on a fresh machine and needs nothing but packages.
# make bench RESULTS=folder: that of the machine, bench/results/cpu (Cascade Lake) or a folder of its own beside it.
# make gpu OUT=folder PART=1|2|3 ONLY=name BUDGET=seconds: with the Python and the torch that are there, which must see a GPU; installs nothing.

PYTHON ?= python3
RESULTS ?= bench/results/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --constraint constraints.txt
# The kernels' build is hidden by pip; setup.py leaves a sentence on what is missing.
COMPLAIN := { test ! -e snows/build.txt || sed -n '2s,{log},snows/build.log,p' snows/build.txt; }
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)

VARY := horizon=0,3,10,end targets=local metric=none preconditioner=kronecker,none samples=256,512,3000 batch=64,256 \
  passes=2 max_iterations=3,10 gradient=batch curvature=hessian

.PHONY: demo test check docs bench accuracy ablations gpu clean

demo: .venv/.base
	@$(BIN)/snows demo

# One file to a process at a time, one thread in each: what a file sets up once is shared by its tests.
test: .venv/.test check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: .venv/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

docs: .venv/.docs
	@$(BIN)/python .ci/api.py

bench: .venv/.test
	@for group in linear linear-bfloat16 conv2d-16 conv2d-16-bfloat16 conv2d-1; do \
	  $(BIN)/python bench/layers.py --group $$group --out $(RESULTS)/layers-$$group.json || exit 1; done
	@$(BIN)/python bench/networks.py --out $(RESULTS)/networks.json
	@$(BIN)/python bench/products.py --out $(RESULTS)/products.json
	@for suite in kernels kernels_rows; do \
	  $(BIN)/python -m pytest -q bench/$$suite.py --benchmark-json=$(RESULTS)/$$suite.json || exit 1; done
	@$(BIN)/python bench/report.py

accuracy: .venv/.test
	@for network in resnet20 vit; do \
	  $(BIN)/python bench/zoo.py --network $$network --out bench/results/cpu/zoo-$$network.json \
	    --patterns $$(test $$network = vit && echo 2:4,0.5 || echo 2:4,1:4,0.8,0.9) && \
	  $(BIN)/python bench/preconditioner.py --network $$network --pattern 2:4 --out bench/results/cpu/preconditioner-$$network.json; done

.venv/.base: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here; name your Python with: make PYTHON=python3.12"; exit 2; }
	@version=$$($(PYTHON) -c 'import sys; print(sys.version_info[0] * 100 + sys.version_info[1])') || \
	  { echo "$(PYTHON) does not run; name another Python with: make PYTHON=python3.12"; exit 2; }; \
	if test $$version -lt 310; then \
	  echo "snows needs Python 3.10 or newer, and $(PYTHON) is older; name another with: make PYTHON=python3.12"; exit 2; fi; \
	if test $$version -gt 314; then echo "Note: snows was tested with Python 3.10 to 3.14; this one is newer."; fi
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python has no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 2; }
	@test -e /proc/driver/nvidia || test "$$(uname -sm)" != "Linux x86_64" || \
	  echo "No NVIDIA GPU was found. Unless a CPU build of torch is at hand, pip fetches the one for CUDA (3 GB, 7 GB on disk);" \
	    "for the CPU's (0.2 GB) stop here and type: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(MAKECMDGOALS)"
	@began=$$(date +%s); test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	  $(PIP) torch numpy setuptools ninja && \
	  echo "Building the native kernels, for a minute or two" && \
	  $(PIP) --quiet --no-build-isolation --editable . && \
	  echo "set-up: $$(( $$(date +%s) - began )) s" && $(COMPLAIN) && touch $@

.venv/.test: .venv/.base
	@$(PIP) --no-build-isolation --editable '.[test]' && $(COMPLAIN) && touch $@

.venv/.docs: .venv/.base
	@$(PIP) pdoc && touch $@

ablations: .venv/.test
	@for network in resnet20 vit; do \
	  $(BIN)/python bench/zoo.py --network $$network --split validation --seeds 1 --out bench/results/cpu/ablations-$$network.json \
	    --patterns $$(test $$network = vit && echo 2:4 || echo 1:4) --methods snows --vary $(VARY); done

gpu:
	@$(PYTHON) bench/gpu.py --out $(or $(OUT),bench/results/gpu) --budget $(or $(BUDGET),540) --only "$(ONLY)" $(if $(PART),--part $(PART))

clean:
	rm -rf .venv build docs/api snows.egg-info snows/_native*.so snows/build.txt snows/build.log .headers
