# make demo      set up .venv and run the whole way on a CPU: train, evaluate, export, chat
# make demo-pretrain   the same for pretraining: text, token files, two stages, a sample of its writing
# make demo-align      SFT, then preference optimisation with LoRA, judged by what the model writes before and after
# make demo-rl         reinforcement learning: a tiny mixture of experts chooses between two habits, with three seeds
# make demo-vl         pictures and clips: three stages of pretraining, fine-tuning, questions answered before and after
# make demo-quantise   the trained model of `make demo` in every scheme of quantised weights: errors, answers, bytes
# make test      set up .venv and run the test suite
# make test-all  the slow tests as well
# make lint      ruff and mypy
# make clean     remove caches and builds (not .venv, not what runs wrote)

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python

# The first interpreter that really runs, is in range and can make a venv: a name on PATH alone may be a version manager's
# shim that only says "command not found". Override with make PYTHON=/path/to/python.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3; do for path in $$(type -aP $$name); do \
	"$$path" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo "$$path" && exit; done; done)

.PHONY: demo demo-pretrain demo-align demo-rl demo-vl demo-quantise test test-all lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(PY) tools/demo.py

demo-pretrain: $(VENV)/.installed
	$(PY) tools/demo_pretrain.py

demo-align: $(VENV)/.installed
	$(PY) tools/demo_align.py

demo-rl: $(VENV)/.installed
	$(PY) tools/demo_rl.py

demo-vl: $(VENV)/.installed-vl
	$(PY) tools/demo_vl.py

demo-quantise: $(VENV)/.installed
	$(PY) tools/demo_quantise.py

test: $(VENV)/.installed-dev
	$(PY) -m pytest -q -n 3 --dist loadfile -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PY) -m pytest -q

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Stamps, so that a second make does not install again; a changed dependency does.
$(VENV)/.installed: $(PY) pyproject.toml setup.py
	@echo "Installing into $(VENV); the first time this takes some minutes, Paddle is large."
	$(PY) -m pip install --quiet --editable '.[cpu]'
	touch $@

$(VENV)/.installed-vl: $(PY) pyproject.toml setup.py
	@echo "Installing into $(VENV); the first time this takes some minutes, Paddle is large."
	$(PY) -m pip install --quiet --editable '.[cpu,demo-vl]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(PY) pyproject.toml setup.py
	@echo "Installing into $(VENV), with what the tests need; the first time this takes some minutes, Paddle is large."
	$(PY) -m pip install --quiet --editable '.[cpu,dev,parquet,serve,video]'
	touch $(VENV)/.installed $@

$(PY):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 with venv found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
