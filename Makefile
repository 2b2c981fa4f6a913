MODEL ?= MLP
DATA ?= SZT
SEEDS ?= 5
PYTHON ?= python3
VENV := .venv/.complete

# The programs import the modules of this folder, also where PYTHONSAFEPATH keeps the current folder from the path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# glibc returns freed memory to the system, and page faults bring it back. If blocks of up to 32 MiB stay, a training step
# on two cores takes 30 ms instead of 46 (MNISTNet) and 1.4 s instead of 1.7 (CIFARNet), at the same peak.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 17179869184

.DEFAULT_GOAL := help
.PHONY: help venv train lr-range sweep convergence plots report table study evidence test test-slow check-gpu bench lock lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV) ## train and measure: MODEL=MLP DATA=SZT GPUS=2 ARGS="--epochs 5" (ARGS=--help: every flag)
	@.venv/bin/python $(if $(GPUS),-m torch.distributed.run --nproc-per-node=$(GPUS)) train.py --model $(MODEL) --data $(DATA) $(ARGS)

LR_RANGE = $(or $(RUN),runs/$(MODEL)-$(DATA)-lr-range)
lr-range: $(VENV) ## the learning-rate range test alone, and its figure: MODEL=MLP DATA=SZT RUN=folder ARGS="..."
	@.venv/bin/python train.py --model $(MODEL) --data $(DATA) --tune only --run-dir $(LR_RANGE) $(ARGS)
	@.venv/bin/python -m analysis.plots $(LR_RANGE)

sweep: $(VENV) ## the runs of several seeds, started, continued or skipped: SEEDS=5 MODEL=MLP DATA=SZT ARGS="..."
	@.venv/bin/python -m tools.sweep $(SEEDS) --model $(MODEL) --data $(DATA) $(ARGS)

convergence: $(VENV) ## DIB of a run's last epoch with 1, 2, 4 and 8 times the steps: RUN=runs/a (the newest)
	@.venv/bin/python -m tools.convergence $(RUN) $(ARGS)

plots: $(VENV) ## draw runs: RUN="runs/a runs/b" (the newest) ARGS="--epochs 1 10 100 --out folder"
	@.venv/bin/python -m analysis.plots $(RUN) $(ARGS)

report: $(VENV) ## one HTML page of runs, with every figure: RUN="runs/a runs/b" (the newest)
	@.venv/bin/python -m analysis.report $(RUN) $(ARGS)

table: $(VENV) ## the final values of runs as Markdown and LaTeX: RUN="runs/a runs/b" (the newest)
	@.venv/bin/python -m analysis.table $(RUN) $(ARGS)

study: $(VENV) ## make the missing runs, figures and tables of docs/study.md, in about 95 minutes on two cores
	@.venv/bin/python -m tools.study

evidence: $(VENV) ## the measures on problems whose answers are known, as a table: ROWS="simplex gaussian" (all)
	@.venv/bin/python -m tools.evidence $(ROWS)

test: $(VENV) ## the tests
	.venv/bin/python -m pytest $(ARGS)

test-slow: $(VENV) ## the slow tests: 1,000 cases of each property, a run killed 20 times
	CASES=1000 .venv/bin/python -m pytest -m "slow or hypothesis" $(ARGS)

check-gpu: ## the tests on a GPU, and a table of how fast it is: gpu.csv; with the torch of PYTHON=python3, no .venv
	$(PYTHON) -m tools.gpu $(ARGS)

bench: $(VENV) ## time the measures against plain code: BENCH_ARGS="nc1 memory rank step growth layout processes dib probes" (all)
	@.venv/bin/python -m tools.bench $(BENCH_ARGS)

lock: test ## write requirements.lock: the exact versions with which the tests have just passed
	@.venv/bin/python -m pip --disable-pip-version-check freeze > requirements.lock
	@sed -i.tmp 's/+.*//' requirements.lock && rm requirements.lock.tmp

lint: $(VENV) ## check the style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

venv: $(VENV) ## make .venv from the requirements files; the other targets do that, too

$(VENV): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; PYTHON=... names one")'
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || { echo "This Python cannot make a .venv: install its venv package (on Debian and Ubuntu python3-venv)"; exit 1; }
	@echo "Installing the packages into .venv; torch takes some minutes."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.DEFAULT:
	@$(PYTHON) -m tools.renamed $@
