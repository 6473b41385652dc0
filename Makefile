# make demo | test | bench | accuracy | ablations: each sets up .venv by itself on a fresh machine and needs nothing but packages.
# make bench RESULTS=folder: that of the machine, bench/results/cpu (Cascade Lake) or bench/results/zen5.
# make gpu OUT=folder PART=1|2|3 ONLY=name BUDGET=seconds: with the Python and the torch that are there, which must see a GPU; installs nothing.

PYTHON ?= python3
RESULTS ?= bench/results/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)

VARY := horizon=0,3,10,end targets=local scaling=none preconditioner=kronecker,none samples=256,512,3000 batch=64,256 \
  passes=2 max_iterations=3,10 gradient=batch curvature=hessian

.PHONY: demo test check bench accuracy ablations gpu clean

demo: .venv/.base
	@$(BIN)/snows demo

test: .venv/.test check
	@$(BIN)/python -m pytest

check: .venv/.test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

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
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || \
	  { echo "snows needs Python 3.10, 3.11 or 3.12; name one with: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python has no venv module; on Debian or Ubuntu: apt install python3-venv"; exit 2; }
	@began=$$(date +%s); test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	  $(PIP) torch numpy setuptools ninja && \
	  $(PIP) --no-build-isolation --editable . && \
	  echo "set-up: $$(( $$(date +%s) - began )) s" && touch $@

.venv/.test: .venv/.base
	@$(PIP) --no-build-isolation --editable '.[test]' && touch $@

ablations: .venv/.test
	@for network in resnet20 vit; do \
	  $(BIN)/python bench/zoo.py --network $$network --split validation --seeds 1 --out bench/results/cpu/ablations-$$network.json \
	    --patterns $$(test $$network = vit && echo 2:4 || echo 1:4) --methods snows --vary $(VARY); done

gpu:
	@$(PYTHON) bench/gpu.py --out $(or $(OUT),bench/results/gpu) --budget $(or $(BUDGET),540) --only "$(ONLY)" $(if $(PART),--part $(PART))

clean:
	rm -rf .venv build snows.egg-info snows/_native*.so
