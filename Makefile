# Every target makes the virtual environment itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv page demo monitor docs test test-units test-ray test-docs test-gpu proof coverage chaos check fix bench bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make the virtual environment

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Making $(VENV): this takes some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

PAGE := edit_ray/page/node_modules/.package-lock.json

page: $(PAGE) ## install hls.js, with which the pages play a growing video, and what tests of pages and the HTTP door need

$(PAGE): edit_ray/page/package-lock.json
	npm ci --prefix edit_ray/page --ignore-scripts --no-audit --no-fund
	@touch $@

demo: $(INSTALLED) ## generate the long video of configs/tiny.yaml on a private local Ray
	$(BIN)/python jobs/demo.py

RUNS ?= $(or $(EDIT_RAY_OUTPUT),$(HOME)/edit_ray_outputs)
PROMETHEUS := 127.0.0.1:9090

# Debian builds Prometheus (+ds) with the older pages alone, below /classic.
monitor: ## Prometheus on monitoring/prometheus, beside the runs in RUNS=folder
	@command -v prometheus >/dev/null || { echo "prometheus is not installed: apt-get install prometheus"; exit 1; }
	@mkdir -p -m 700 "$(RUNS)" && mkdir -p build/prometheus && ln -sfn "$(abspath $(RUNS))" monitoring/prometheus/runs
	@echo "runs: $(RUNS)  dashboards: monitoring/README.md  (end with Ctrl-C)"
	@at="http://$(PROMETHEUS)$$(prometheus --version 2>&1 | grep -q '+ds' && echo /classic)"; \
	  echo "targets: $$at/targets  alerts: $$at/alerts"; \
	  echo "segments: $$at/graph?g0.expr=edit_ray_segments_total&g0.tab=0"
	@prometheus --config.file=monitoring/prometheus/prometheus.yml --storage.tsdb.path=build/prometheus \
	  --storage.tsdb.retention.size=1GB --web.listen-address=$(PROMETHEUS) --log.level=warn

DOCS := $(VENV)/.docs

docs: $(DOCS) ## build the documentation into build/docs; warnings and broken links are errors
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build
	@echo "$(abspath build/docs/index.html)"

$(DOCS): $(INSTALLED)
	@echo "Installing what the site is built with: this takes a minute."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

test: check ## everything that must hold before a commit: check, then the tests, in two halves at a time
	@$(HALVES)

# On Ray a test mostly waits for processes to start and for one thread's work: the other half takes what that leaves, at
# a niceness above that of Ray's actors (10, tests/conftest.py). MARKED chooses by marker.
MARKED ?=
HALVES := echo "Two halves of the tests run side by side; each tells all that it has to tell at its end." && \
  $(MAKE) --no-print-directory --jobs 2 --output-sync=target test-units test-ray

test-units: $(INSTALLED) ## the half of the tests that needs no Ray
	OMP_NUM_THREADS=1 nice -n 16 $(BIN)/pytest $(MARKED) -n 3 --dist loadfile tests/unit tests/parity

test-ray: $(INSTALLED) ## the half that runs on one Ray
	$(BIN)/pytest $(MARKED) tests/ray tests/chaos

test-docs: $(INSTALLED) ## the tests of the documentation, the benchmarks and the training of the embedded model
	OMP_NUM_THREADS=1 $(BIN)/pytest $(MARKED) -n 2 --dist loadfile tests/docs tests/benchmarks tests/training

proof: check $(DOCS) ## the tests together with the slow and the chaos proofs, in the same two halves
	@$(HALVES) MARKED='-m "not gpu and not timed"'
	$(MAKE) --no-print-directory test-docs MARKED='-m "not gpu and not timed"'
	$(BIN)/pytest -m timed

COVERED ?= not gpu and not timed
MEASURED := $(abspath build/coverage)

coverage: $(INSTALLED) $(DOCS) ## how much of edit_ray/ the proofs run through, Ray's workers included; COVERED chooses by marker
	rm -rf $(MEASURED) && mkdir -p $(MEASURED)
	export COVERAGE_FILE=$(MEASURED)/data COVERAGE_PROCESS_START=$(abspath pyproject.toml) PYTHONPATH=$(abspath tests/coverage); \
	  $(HALVES) MARKED='-m "$(COVERED)"' && $(MAKE) --no-print-directory test-docs MARKED='-m "$(COVERED)"'
	cd $(MEASURED) && COVERAGE_FILE=$(MEASURED)/data $(abspath $(BIN))/coverage combine --rcfile=$(abspath pyproject.toml)
	COVERAGE_FILE=$(MEASURED)/data $(BIN)/coverage report --fail-under=90

test-gpu: $(INSTALLED) ## what only a CUDA device can show
	$(BIN)/pytest -m gpu tests/gpu

chaos: $(INSTALLED) ## kill processes of runs at random instants; KILLS=300, AIMED=10 (each stage), SEED=7 choose which
	$(if $(SEED),SEED=$(SEED)) KILLS=$(or $(KILLS),20) $(BIN)/pytest tests/chaos -m chaos -s

check: $(INSTALLED) ## lint, formatting, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## run the benchmarks
	$(BIN)/python benchmarks/store_io.py
	$(BIN)/python benchmarks/tiered_longrun.py --mib-scale 1/64
	$(BIN)/python benchmarks/tiered_longrun.py --mib-scale 1/64 --actor
	$(BIN)/python benchmarks/skip_overhead.py
	$(BIN)/python benchmarks/policies.py --quick
	$(BIN)/python benchmarks/continuity.py --quick
	$(BIN)/python benchmarks/reuse.py --quick

RESULTS ?= benchmarks/results

bench-gpu: $(INSTALLED) ## run the benchmarks of a GPU, results into RESULTS=folder; scale.py wants two
	for name in wan_table skip_cost long_video memory_bound overhead peak_memory block_offload causal causal_windows scale; do \
	  $(BIN)/python benchmarks/$$name.py --output $(RESULTS)/$$name || echo "$$name.py has failed"; done
	$(BIN)/python benchmarks/skip_cost.py --layouts i2v-14B i2v-A14B vace-14B --output $(RESULTS)/skip_layouts || echo "skip_cost.py has failed"
	$(BIN)/python benchmarks/peak_memory.py --cards 12 16 24 48 80 --seconds 600 --output $(RESULTS)/cards || echo "peak_memory.py has failed"
	for mode in exact fast; do \
	  $(BIN)/python benchmarks/loop_trace.py --mode $$mode --output $(RESULTS)/loop_trace || echo "loop_trace.py has failed"; done
	$(BIN)/python benchmarks/gpu_page.py

clean: ## remove caches and builds (the virtual environment stays)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
