MODEL ?= MLP
DATA ?= SZT
SEEDS ?= 5
PYTHON ?= python3
VENV := .venv/.complete

# The programs import the modules of this folder, also where PYTHONSAFEPATH keeps the current folder from the path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# By default glibc returns large freed blocks to the system, and allocating them again causes page faults. If blocks of up
# to 32 MiB are retained, a training step on two cores takes 30 ms instead of 46 ms (MNISTNet) and 1.4 s instead of 1.7 s
# (CIFARNet). The peak memory is the same.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 17179869184

.DEFAULT_GOAL := help
.PHONY: help venv train lr-range sweep convergence plots report table study evidence test test-slow check-gpu bench lock lint

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV) ## train and measure: MODEL=MLP DATA=SZT GPUS=2 ARGS="--epochs 5" (ARGS=--help: every flag)
	@.venv/bin/python $(if $(GPUS),-m torch.distributed.run --nproc-per-node=$(GPUS)) train.py --model $(MODEL) --data $(DATA) $(ARGS)

LR_RANGE = $(or $(RUN),runs/$(MODEL)-$(DATA)-lr-range)
lr-range: $(VENV) ## run the learning-rate range test without training, and plot it: MODEL=MLP DATA=SZT RUN=folder ARGS="..."
	@.venv/bin/python train.py --model $(MODEL) --data $(DATA) --tune only --run-dir $(LR_RANGE) $(ARGS)
	@.venv/bin/python -m analysis.plots $(LR_RANGE)

sweep: $(VENV) ## run several seeds, skip finished runs and continue others: SEEDS=5 MODEL=MLP DATA=SZT ARGS="..."
	@.venv/bin/python -m tools.sweep $(SEEDS) --model $(MODEL) --data $(DATA) $(ARGS)

convergence: $(VENV) ## measure DIB of an epoch with 1, 2, 4 and 8 times the probe steps: RUN=runs/a (default: the newest run) EPOCH=3 (default: the last)
	@.venv/bin/python -m tools.convergence $(RUN) $(if $(EPOCH),--epoch $(EPOCH)) $(ARGS)

plots: $(VENV) ## plot the figures of runs: RUN="runs/a runs/b" (default: the newest run) ARGS="--epochs 1 10 100 --out folder"
	@.venv/bin/python -m analysis.plots $(RUN) $(ARGS)

report: $(VENV) ## write an HTML page with every figure of runs: RUN="runs/a runs/b" (default: the newest run)
	@.venv/bin/python -m analysis.report $(RUN) $(ARGS)

table: $(VENV) ## write the final values of runs as Markdown and LaTeX: RUN="runs/a runs/b" (default: the newest run)
	@.venv/bin/python -m analysis.table $(RUN) $(ARGS)

study: $(VENV) ## make the missing runs, figures and tables of docs/study.md, in about 95 minutes on two cores
	@.venv/bin/python -m tools.study

evidence: $(VENV) ## check NC1 and DIB on problems with known solutions, and print a table: ROWS="simplex gaussian" (default: all)
	@.venv/bin/python -m tools.evidence $(ROWS)

test: $(VENV) ## run the tests, in two processes of one thread each
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV) ## run the slow tests
	CASES=1000 .venv/bin/python -m pytest -m "slow or hypothesis" $(ARGS)

check-gpu: ## run the tests on a GPU and write timings to gpu.csv, with PYTHON=python3 instead of .venv
	$(PYTHON) -m tools.gpu $(ARGS)

bench: $(VENV) ## time NC1 and DIB against straightforward code: BENCH_ARGS="nc1 memory rank step growth layout processes dib probes" (default: all)
	@.venv/bin/python -m tools.bench $(BENCH_ARGS)

lock: test ## run the tests, then write the installed versions to requirements.lock
	@.venv/bin/python -m pip --disable-pip-version-check freeze > requirements.lock
	@sed -i.tmp 's/+.*//' requirements.lock && rm requirements.lock.tmp

lint: $(VENV) ## check the style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

venv: $(VENV) ## create .venv from the requirements files; other targets do this automatically

$(VENV): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is required: set PYTHON=... to choose one")'
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || { echo "This Python cannot make a .venv: install its venv package (on Debian and Ubuntu python3-venv)"; exit 1; }
	@echo "Installing the packages into .venv; torch takes some minutes."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.DEFAULT:
	@$(PYTHON) -m tools.renamed $@
