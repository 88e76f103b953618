# `make` prints what there is. `make PYTHON=python3 TARGET` takes that interpreter as it is and makes no environment.

ifdef PYTHON
PY := $(PYTHON)
READY :=
BOOK :=
else
PY := .venv/bin/python
READY := .venv/.ready
BOOK := .venv/.ready-book
endif

CHAPTERS := $(shell python3 shared/chapters.py names)
MODEL ?= pocket
PROMPT ?= Explain KV cache in one sentence.
# By the environment a text reaches a program as it was typed: neither make nor the shell reads it.
export PROMPT_AS_TYPED = $(value PROMPT)
export ASK_AS_TYPED = $(value ASK)
export TOKENIZERS_PARALLELISM := false
# Compiled modules are kept beside their sources: otherwise each of many processes compiles them again.
unexport PYTHONDONTWRITEBYTECODE
# Tests run as many at a time as there are cores, in the order in which they were found.
PYTEST := $(PY) -m pytest -n logical --dist worksteal
# All other tests use no GPU, so that they say the same on every machine.
ON_GPU = if nvidia-smi -L > /dev/null 2>&1; then echo "on the GPU:"; $(PY) -m pytest --gpu $(1); fi

.DEFAULT_GOAL := help
.PHONY: help setup setup-book demo test test-tools test-all doctor sync check prove $(CHAPTERS:%=test-%) $(CHAPTERS:%=run-%) \
	$(CHAPTERS:%=diff-%) $(CHAPTERS:%=nbdiff-%) $(CHAPTERS:%=traps-%) $(CHAPTERS:%=break-%) hunt reveal traps-answers \
	notebooks nbdime docs docs-serve film mutants \
	$(CHAPTERS:%=bench-%) bench bench-all bench-gpu bench-attention traps traps-matrix propagate trace soak serve chat load

help:
	@echo "begin"
	@echo "  make demo           a fresh machine: set up, run every chapter on the embedded model, show that all say the same"
	@echo "  make test           a fresh machine: set up, run the tests: of every chapter some, see tests/matrix.py"
	@echo "  make setup          .venv with everything for the tests; does nothing when it is up to date"
	@echo "  make setup-book     and with what notebooks and the site need beside it"
	@echo "  make doctor         versions, device, memory, what is missing: what a bug report needs"
	@echo
	@echo "read a chapter"
	@echo "  make run-vNN        one prompt through a chapter: PROMPT=\"...\" MODEL=directory-or-hub-id ARGS=\"--stats\""
	@echo "  make diff-vNN       what it changes, unit by unit; make nbdiff-vNN: what its notebook changes"
	@echo "  make test-vNN       all of its tests"
	@echo "  make trace          who ran in which forward pass: ARGS=\"v03 v04\", ARGS=\"v03 --html build/trace.html\""
	@echo "  make break-vNN      a bug to find: one of its traps, planted in a copy; then make hunt, make reveal"
	@echo "  make traps-vNN      plant each of its seeded bugs, and see the test that catches it"
	@echo
	@echo "serve"
	@echo "  make serve          the last chapter's server: MODEL=directory-or-hub-id ARGS=\"--port 8000\""
	@echo "  make chat           talk to it, from a second terminal"
	@echo "  make load           clients for it, and what they feel: ARGS=\"--connections 16\" or ARGS=\"--rate 4\""
	@echo
	@echo "measure"
	@echo "  make bench          every chapter beside Hugging Face and the machine's limit: ten minutes, on an idle machine"
	@echo "  make bench-vNN      a chapter, the one before, and Hugging Face"
	@echo "  make bench-all      and then larger work and models: by hand, an hour on an idle machine"
	@echo "  make bench-gpu      on a GPU: every chapter beside Hugging Face and the memory's limit; ARGS=--dry-run anywhere"
	@echo "  make bench-attention  on a GPU: the attention kernel against torch and against the limit of the memory; ARGS=--dry-run anywhere"
	@echo "  make soak           thousands of requests with aborts, and an audit of the memory at every step"
	@echo
	@echo "write"
	@echo "  make prove          every proof, with the time of each stage: what CI runs"
	@echo "  make test-all       all tests of all chapters; make test-tools: only those of the tools"
	@echo "  make check          fail if anything generated is stale, or a claim of a text is false; make sync writes it"
	@echo "  make propagate      carry a change through all later chapters: FROM=vNN, or ARGS=--continue, ARGS=--abort"
	@echo "  make new-vNN        begin a chapter as a copy of the last one: NAME=..."
	@echo "  make notebooks      write and run the notebooks from their sources; make nbdime: git shows and merges them by cells"
	@echo "  make docs           the site, in build/site; make docs-serve shows it"
	@echo "  make film           the first five minutes, as moving pictures: ARGS=race"
	@echo
	@echo "write, slowly"
	@echo "  make traps-answers  what the model says with each seeded bug, where that is not known yet"
	@echo "  make traps-matrix   which tests of a whole suite see each seeded bug"
	@echo "  make mutants        random damage, and whether a test notices: ARGS=\"v05 --new --record\""
	@echo
	@echo "chapters: $(CHAPTERS)"

setup: $(READY)

.venv/.ready: constraints.txt pyproject.toml shared/commands/install.py
	@python3 shared/commands/install.py

# What notebooks and the site need beside it.
setup-book: $(BOOK)

.venv/.ready-book: .venv/.ready
	@python3 shared/commands/install.py book

demo: $(READY)
	@$(PY) -m shared.commands.demo

test: $(READY)
	@$(PYTEST)
	@$(call ON_GPU)

test-tools: $(READY)
	@$(PYTEST) --tools

test-all: $(READY)
	@for chapter in $(CHAPTERS); do $(PYTEST) --full $$chapter --both-ways || exit 1; done
	@$(PYTEST) --tools
	@$(call ON_GPU,--all)

doctor: $(READY)
	@$(PY) -m shared.commands.doctor

sync: $(READY)
	@$(PY) -m shared.book.claims.sync

check: $(READY)
	@$(PY) -m shared.book.claims.sync --check

prove: $(BOOK)
	@$(PY) -m shared.book.prove

docs: $(BOOK)
	@$(PY) -m shared.book.site

docs-serve: $(BOOK)
	@$(PY) -m shared.book.site --serve

notebooks: $(BOOK)
	@$(PY) -m shared.book.notebooks

nbdime: $(BOOK)
	@$(PY) -m shared.book.notebooks nbdime

$(CHAPTERS:%=nbdiff-%): nbdiff-%: $(BOOK)
	@$(PY) -m shared.book.notebooks diff $*

$(CHAPTERS:%=break-%): break-%: $(READY)
	@$(PY) -m shared.book.traps.hunt break $* $(ARGS)

hunt: $(READY)
	@$(PY) -m shared.book.traps.hunt hunt $(if $(value ASK),--ask="$$ASK_AS_TYPED")

reveal: $(READY)
	@$(PY) -m shared.book.traps.hunt reveal

film: $(BOOK)
	@$(PY) -m shared.book.site.film $(ARGS)

mutants: $(READY)
	@$(PY) -m shared.book.traps.mutants $(ARGS)

traps-answers: $(READY)
	@$(PY) -m shared.book.traps.answers $(ARGS)

traps: $(READY)
	@$(PY) -m shared.book.traps --all

traps-matrix: $(READY)
	@$(PY) -m shared.book.traps matrix

trace: $(READY)
	@$(PY) -m shared.commands.trace $(ARGS)

soak: $(READY)
	@$(PY) -m shared.verify.soak $(ARGS)
	@$(PY) -m shared.verify.soak_server

serve: $(READY)
	@$(PY) -m shared.commands.serve --model "$(MODEL)" $(ARGS)

chat: $(READY)
	@$(PY) -m shared.commands.chat $(ARGS)

load: $(READY)
	@$(PY) -m shared.bench.load $(ARGS)

bench: $(READY)
	@$(PY) -m shared.bench suite --repeats 3 $(ARGS)

bench-all: $(READY)
	@$(PY) -m shared.bench suite --repeats 3 $(ARGS)
	@$(PY) -m shared.bench large --repeats 3 $(ARGS)

bench-gpu: $(READY)
	@$(PY) -m shared.bench.gpu $(ARGS)

$(CHAPTERS:%=bench-%): bench-%: $(READY)
	@$(PY) -m shared.bench suite $* --before --repeats 3 $(ARGS)

bench-attention: $(READY)
	@$(PY) -m shared.bench.attention $(ARGS)

propagate: $(READY)
	@$(PY) -m shared.book.propagate $(FROM) $(ARGS)

new-%: $(READY)
	@$(PY) -m shared.book.new $* "$(NAME)"

$(CHAPTERS:%=test-%): test-%: $(READY)
	@$(PYTEST) --full $*
	@$(call ON_GPU,--chapter $*)

# A base model is prompted as it is, a chat model through its template; the program says which.
$(CHAPTERS:%=run-%): run-%: $(READY)
	@$(PY) -m shared.commands.run $* "$$PROMPT_AS_TYPED" --model "$(MODEL)" $(ARGS)

$(CHAPTERS:%=diff-%): diff-%: $(READY)
	@$(PY) -m shared.book.diff $*

$(CHAPTERS:%=traps-%): traps-%: $(READY)
	@$(PY) -m shared.book.traps $*

# What no rule above has: a chapter that does not exist.
test-v% run-v% diff-v% nbdiff-v% traps-v% break-v% bench-v%:
	@echo "there is no chapter v$*; the chapters are $(CHAPTERS)" >&2; exit 2
