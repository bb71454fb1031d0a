PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .venv-peers
ELSEWHERE := .venv-elsewhere
FUZZ := .venv-fuzz
MUTANTS := .venv-mutants
TOOLS := .venv-dist
PAGES := .venv-pages

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint gold docs man bench latency zoo peers exports verification large streaming \
	published gpu-check pickles fuzz durability random styles elsewhere prices mutants dist false-claims faults pictures

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(STAMP) ## make .venv with bntool, the zoo and the tools

# torch and torchvision first and by themselves: everything after builds on the pair that fits together.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo,dev]'
	touch $@

demo: setup ## insert, summary, fold, export and verify on the sample network
	$(BIN)/bntool demo --force

# One process a core, each on one thread: twice as fast as one process on all threads, and nothing contends.
test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

check: lint ## ruff and strict mypy
	$(BIN)/mypy

lint: setup ## ruff alone
	$(BIN)/ruff check .

gold: setup ## write the golden files anew; read the diff afterwards
	$(BIN)/python -m pytest --regold

docs: setup man ## build the docs site into site/; a link that leads nowhere is an error
	$(BIN)/python tools/docs/make_reasons.py
	$(BIN)/python tools/docs/draw_laws.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site

man: setup ## write the man page and the page of commands from the help texts
	$(BIN)/python tools/docs/make_reference.py

# What makes a page of a notebook lies in an environment of its own.
$(PAGES)/.installed:
	test -x $(PAGES)/bin/python || $(PYTHON) -m venv $(PAGES)
	$(PAGES)/bin/python -m pip install --quiet nbconvert
	touch $@

pictures: setup $(PAGES)/.installed ## make the pictures of docs/pictures.md anew; needs Chromium
	$(BIN)/python -m tools.docs.make_pictures --nbconvert $(PAGES)/bin/jupyter-nbconvert

latency: setup ## time folded networks against the same ones built without BatchNorm
	$(BIN)/python tools/measures/latency.py

bench: $(PEERS)/.installed ## measure time and memory, beside other tools; goes on where it stopped
	$(PEERS)/bin/python tools/measures/bench.py

false-claims: setup ## bench A against A a hundred times; more than one difference claimed is an error
	$(BIN)/python -m tools.measures.false_claims

zoo: setup ## fold and insert over every torchvision and timm model; goes on where it stopped
	$(BIN)/python -m tools.sweeps.zoo

# A peer that cannot be had on this machine is a column of failures, not a comparison less.
$(PEERS)/.installed: pyproject.toml constraints.txt tools/sweeps/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo]'
	for peer in $$(grep -v '^#' tools/sweeps/peers.txt); do \
		$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt $$peer || echo "without $$peer"; \
	done
	touch $@

peers: $(PEERS)/.installed ## compare with the best BatchNorm folders, AS=onnx on ONNX files; goes on where it stopped
	$(PEERS)/bin/python -m tools.sweeps.$(if $(filter onnx,$(AS)),peer_files,peers)

$(ELSEWHERE)/.installed: pyproject.toml constraints.txt tools/sweeps/elsewhere.txt tools/sweeps/libraries/installed.txt
	test -x $(ELSEWHERE)/bin/python || $(PYTHON) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(ELSEWHERE)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo]'
	$(ELSEWHERE)/bin/python -m pip install --quiet --no-deps --requirement tools/sweeps/elsewhere.txt
	grep -v '^#' tools/sweeps/libraries/installed.txt | while read library; do \
		$(ELSEWHERE)/bin/python -m pip install --quiet --prefer-binary --constraint constraints.txt $$library \
		|| $(ELSEWHERE)/bin/python -m pip install --quiet --no-deps $$library || echo "not installed: $$library"; \
	done
	touch $@

elsewhere: $(ELSEWHERE)/.installed ## fold and insert over the models of other libraries; goes on where it stopped
	$(ELSEWHERE)/bin/python -m tools.sweeps.elsewhere

prices: $(ELSEWHERE)/.installed ## time the folds of other libraries' models, in forwards; goes on where it stopped
	$(ELSEWHERE)/bin/python -m tools.measures.prices

AS ?= module
random: setup ## fold and insert over networks made at random, AS=module, program or onnx
	$(BIN)/python -m tools.sweeps.random_folds --as $(AS)


styles: setup ## fold, insert into and verify ONNX files in the styles of six exporters
	$(BIN)/python -m tools.sweeps.styled_files

published: setup ## fold, insert into and verify the ONNX files of published packages; goes on where it stopped
	$(BIN)/python -m tools.sweeps.published

faults: setup ## fold networks made at random, half of them wrongly, AS=module, program or onnx: is it found?
	$(BIN)/python -m tools.sweeps.random_faults --as $(AS)

exports: setup ## fold, export and verify torchvision's and timm's models; goes on where it stopped
	$(BIN)/python -m tools.sweeps.exports

verification: setup ## verify forty correct models; goes on where it stopped
	$(BIN)/python -m tools.sweeps.forty

large: setup ## fold an ONNX model of more than 2 GB, with its time and peak memory
	$(BIN)/python tools/measures/large_onnx.py

streaming: setup ## fold a file of weights of 6 GB layer by layer, with its time and peak memory
	$(BIN)/python -m tools.measures.streaming

pickles: setup ## load the whole-module pickles of torchvision and timm; goes on where it stopped
	$(BIN)/python -m tools.sweeps.pickles

# The second part is guided by coverage, by a fuzzer in an environment of its own.
fuzz: setup ## damage files of every format 10,000 times, and rewrite archives as often; none may pass unseen
	$(BIN)/python -m tools.sweeps.fuzz
	$(BIN)/python -m tools.sweeps.fuzz_archives
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet atheris
	PYTHONPATH=.:$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/.. $(FUZZ)/bin/python tools/sweeps/fuzz_guided.py -max_total_time=300

$(MUTANTS)/.installed: tools/sweeps/mutants.txt
	test -x $(MUTANTS)/bin/python || $(PYTHON) -m venv $(MUTANTS)
	$(MUTANTS)/bin/python -m pip install --quiet --requirement tools/sweeps/mutants.txt
	touch $@

$(TOOLS)/.installed: tools/dist.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --requirement tools/dist.txt
	touch $@

dist: $(TOOLS)/.installed ## build wheel and sdist twice and alike, check them, try the wheel in an empty environment
	$(TOOLS)/bin/python tools/dist.py

ONLY ?=
mutants: setup $(MUTANTS)/.installed ## change the source one thing at a time, ONLY=comparing or all: do the tests notice?
	$(BIN)/python -m tools.sweeps.mutants --only '$(ONLY)'

durability: setup ## kill the writers 200 times and fill the disk 50 times; no file may be lost
	$(BIN)/python -m tools.sweeps.durability

# No setup: a machine with a GPU may have no network, and has a torch of its own.
gpu-check: ## run the tests that need an NVIDIA GPU, measure there, and write docs/gpu.md and docs/gpu.json
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.measures.gpu_check --require-gpu
