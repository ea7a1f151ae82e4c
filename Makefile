# One environment per checkout, in .venv; every target makes it first if it is missing or out of date.
#   make install PYTHON=python3.12        another interpreter
#   make install EXTRAS=dev,cuda13        other extras, see pyproject.toml
#   make test PYTEST_ARGS="-k prompt -x"  part of the tests

VENV ?= .venv
EXTRAS ?= dev
PYTEST_ARGS ?=
BENCHMARK_ARGS ?=
FAULTS_ARGS ?=
NAME ?=
LADDER_ARGS ?=
TWO := --numprocesses 2 --dist worksteal  # pytest in two processes: each needs gigabytes

# The newest interpreter that really starts and can make environments (a name on the PATH proves nothing): from 3.12 on it
# brings jax 0.12, which multiplies bfloat16 on a CPU at twice the rate. What needs torch or TensorFlow stays on 3.11.
PROBE = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(PROBE)' >/dev/null 2>&1 && echo $$python && break; done)

comma := ,
PIP = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt
STAMP = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# pip compiles no bytecode (a minute, most of it never used); Python does so at the first import, if it may.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-lm paper ladder docs site test test-slow test-torch test-libtpu test-cuda test-network test-seqio test-cloud test-http test-wheel test-faults benchmark lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with the library in editable form (one to two minutes, once)
	@:

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "PYTHON: found none that works; expected 3.11 or newer with venv; install one, or say make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) with $$($(VENV)/bin/python --version), extras: $(EXTRAS)"
	@$(PIP) --upgrade pip  # the one that comes with Python 3.11 takes 20 s longer
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

demo: install  ## prompt-tune the embedded T5 on movie sentences, then answer three
	$(VENV)/bin/softprompt train configs/quickstart.yaml --out runs/demo
	@printf '%s\n' \
		'{"inputs": "a warm , funny and quietly moving film ."}' \
		'{"inputs": "two hours of my life that i will never get back ."}' \
		'{"inputs": "the jokes fall flat and the plot makes no sense ."}' \
		| $(VENV)/bin/softprompt predict runs/demo --input - --output -

demo-lm: install  ## prompt-tune SmolLM2 (a 93 MB package) on movie sentences and on six intents, then answer both at once
	$(VENV)/bin/softprompt train configs/smollm2.yaml --out runs/lm/movies
	$(VENV)/bin/softprompt train configs/intents/run.yaml --out runs/lm/intents
	@printf '%s\n' \
		'{"prompt": "movies", "inputs": "a warm , funny and quietly moving film ."}' \
		'{"prompt": "intents", "inputs": "Message: my parcel should have been here on tuesday\nIntent:"}' \
		'{"prompt": "movies", "inputs": "two hours of my life that i will never get back ."}' \
		'{"prompt": "intents", "inputs": "Message: pls send it to 4 Mill Lane instead\nIntent:"}' \
		| $(VENV)/bin/softprompt predict runs/lm --input - --output -
	@echo 'to serve both over HTTP: $(VENV)/bin/softprompt serve runs/lm   (inputs as above)'

test: install  ## run the default tests (no torch, no network, under 8 minutes)
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-slow: install  ## run the long tests
	$(VENV)/bin/python -m pytest $(TWO) $(PYTEST_ARGS) \
		-m "slow and not network and not torch and not seqio and not cloud and not http and not tpu and not libtpu and not gpu and not cuda"

test-torch:  ## compare with PyTorch and PEFT, in an environment of its own (.venv-torch)
	$(MAKE) install VENV=.venv-torch EXTRAS=dev,torch PYTHON=python3.11
	.venv-torch/bin/python -c 'import torch, peft'  # where they are missing, the tests would only be skipped
	.venv-torch/bin/python -m pytest $(TWO) -m "torch and not slow" $(PYTEST_ARGS)

test-libtpu:  ## compile for TPUs without one, in the environment of a TPU VM (.venv-tpu)
	$(MAKE) install VENV=.venv-tpu EXTRAS=dev,tpu,cloud
	.venv-tpu/bin/python -m pytest -m libtpu $(PYTEST_ARGS)

test-cuda:  ## compile for NVIDIA GPUs without one, in an environment of its own (.venv-cuda, 5 GB)
	$(MAKE) install VENV=.venv-cuda EXTRAS=dev,cuda13 PYTHON=python3.11
	.venv-cuda/bin/python -m pytest tests/test_cuda.py -m cuda $(PYTEST_ARGS)

test-network: install  ## run the tests that download
	HF_HUB_OFFLINE=0 $(VENV)/bin/python -m pytest $(TWO) -m "network and not torch and not slow" $(PYTEST_ARGS)

test-seqio:  ## compare with T5's preprocessors and metrics, run a seqio Task, in an environment of its own (.venv-seqio)
	$(MAKE) install VENV=.venv-seqio EXTRAS=dev,seqio PYTHON=python3.11
	.venv-seqio/bin/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt t5 gin-config babel
	.venv-seqio/bin/python -c 'import seqio, t5'
	.venv-seqio/bin/python -m pytest $(TWO) -m seqio $(PYTEST_ARGS)

test-cloud:  ## run on gs:// and s3:// against stand-ins, in the environment of a TPU VM (.venv-tpu)
	$(MAKE) install VENV=.venv-tpu EXTRAS=dev,tpu,cloud
	.venv-tpu/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt gcp-storage-emulator 'moto[server]'
	.venv-tpu/bin/python -m pytest -m cloud $(PYTEST_ARGS)

test-http:  ## other programs (clients of the server, wandb, lm-evaluation-harness) in an environment of its own (.venv-http)
	$(MAKE) install VENV=.venv-http EXTRAS=dev,lm-eval
	.venv-http/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt schemathesis openai wandb
	.venv-http/bin/python -m pytest -m http $(PYTEST_ARGS)

test-wheel: install  ## build sdist and wheel, install them into clean environments, train from there
	$(VENV)/bin/python tests/from_wheel.py

test-faults: install  ## kill, damage, attack, mistype, ask: 900 cases in 3 minutes, 5,760 with LONG=1
	PYTHONPATH=tests $(VENV)/bin/python -m faults $(FAULTS_ARGS)

benchmark:  ## time a training step beside PEFT's (in .venv-torch), see benchmarks/README.md
	$(MAKE) install VENV=.venv-torch EXTRAS=dev,torch PYTHON=python3.11
	.venv-torch/bin/python benchmarks/training_step.py $(BENCHMARK_ARGS)

paper: install  ## run a miniature of the paper's experiments: make paper NAME=length
	$(VENV)/bin/softprompt paper $(NAME) --to benchmarks/results/paper/$(NAME).json

ladder: install  ## pre-train backbones of four sizes in three forms (hours; see docs/pretraining.md)
	$(VENV)/bin/python configs/pretrain/ladder/make.py $(LADDER_ARGS)

docs: install  ## write the pages and tables that come from configs, methods and results
	$(VENV)/bin/python docs/build.py

site: install  ## build the documentation site into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: install  ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/shellcheck tpu/*.sh tpu/gpu/*.sh benchmarks/*.sh

format: install  ## format and mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove environments and caches, keep runs
	rm -rf .venv .venv-torch .venv-seqio .venv-http .venv-tpu .venv-cuda .pytest_cache .ruff_cache build dist *.egg-info
