# `make` lists the targets. `make PYTHON=python3 TARGET` uses that interpreter as it is and creates no environment.

ifdef PYTHON
PY := $(PYTHON)
READY :=
BOOK :=
SAY_AS_IT_IS = @:$(info setup: nothing is installed, since PYTHON=$(PYTHON) is used as it is; leave PYTHON out to set up .venv)
else
PY := .venv/bin/python
READY := .venv/.ready
BOOK := .venv/.ready-book
endif

LISTS = $(or $(PYTHON),$(wildcard .venv/bin/python),python3)
CHAPTERS := $(shell "$(LISTS)" shared/chapters.py names 2>/dev/null || python3 shared/chapters.py names)
MODEL ?= pocket
PROMPT ?= Explain KV cache in one sentence.
# Passed through the environment, words reach the program as typed: neither make nor the shell interprets them.
export PROMPT_AS_TYPED = $(value PROMPT)
export ASK_AS_TYPED = $(value ASK)
export NAME_AS_TYPED = $(value NAME)
export TOKENIZERS_PARALLELISM := false
# Keep compiled modules beside their sources: otherwise each of many processes compiles them again.
unexport PYTHONDONTWRITEBYTECODE
# One test worker per core; tests start in the order in which they were collected.
PYTEST := $(PY) -m pytest -n logical --dist worksteal
# All other tests run on the CPU, so their result is the same on every machine.
ON_GPU = if nvidia-smi -L > /dev/null 2>&1; then echo "on the GPU:"; $(PY) -m pytest --gpu $(1); fi

.DEFAULT_GOAL := help
.PHONY: help setup setup-book demo test test-tools test-all doctor sync check prove $(CHAPTERS:%=test-%) $(CHAPTERS:%=run-%) \
	$(CHAPTERS:%=diff-%) $(CHAPTERS:%=nbdiff-%) $(CHAPTERS:%=traps-%) $(CHAPTERS:%=break-%) hunt reveal traps-answers \
	notebooks nbdime docs docs-serve film mutants \
	$(CHAPTERS:%=bench-%) bench bench-all bench-peers bench-gpu bench-attention traps traps-matrix propagate trace soak operate serve chat load agent

help:
	@echo "start here"
	@echo "  make demo           set up, race the chapters on the bundled model, check every token against Hugging Face"
	@echo "  make test           set up, run some tests of every chapter (tests/matrix.py says which) and those of the tools"
	@echo "  make setup          create .venv with everything the tests need; does nothing if it is up to date"
	@echo "  make setup-book     add what notebooks and the site need"
	@echo "  make doctor         versions, device, memory and missing packages, for a bug report"
	@echo
	@echo "read a chapter"
	@echo "  make run-vNN        run one prompt: PROMPT=\"...\" MODEL=directory-or-hub-id ARGS=\"--stats\""
	@echo "  make diff-vNN       what it changes, function by function; make nbdiff-vNN: what its notebook changes"
	@echo "  make test-vNN       all tests of the chapter"
	@echo "  make trace          which request ran in which step: ARGS=\"v03 v04\", ARGS=\"v03 --html build/trace.html\""
	@echo "  make break-vNN      plant one of its bugs in a copy for you to find; then make hunt, make reveal"
	@echo "  make traps-vNN      plant each of its bugs, and show the test that catches it"
	@echo
	@echo "serve"
	@echo "  make serve          the last chapter's server: MODEL=directory-or-hub-id ARGS=\"--port 8000\""
	@echo "  make chat           talk to it, from a second terminal"
	@echo "  make agent          a small model calls functions of yours: ASK=\"What is 17 plus 25?\" MODEL=directory-or-hub-id"
	@echo "  make load           put it under load, and report what the clients measure: ARGS=\"--connections 16\" or ARGS=\"--rate 4\""
	@echo
	@echo "measure"
	@echo "  make bench          every chapter beside Hugging Face and the machine's limit: ten minutes on an idle machine"
	@echo "  make bench-vNN      a chapter, the one before it, and Hugging Face"
	@echo "  make bench-all      the same, then larger workloads and models: an hour on an idle machine"
	@echo "  make bench-peers    on the CPU: v13 and v14 beside Hugging Face, vLLM and OpenVINO, where these are installed"
	@echo "  make bench-gpu      on a GPU: every chapter beside Hugging Face and the memory bandwidth's limit; ARGS=--dry-run anywhere"
	@echo "  make bench-attention  on a GPU: the attention kernel against torch and the memory bandwidth's limit; ARGS=--dry-run anywhere"
	@echo "  make soak           thousands of requests with aborts, and an audit of the cache after every step"
	@echo "  make operate        an hour of the last chapter's server: do log, metrics and page say what its clients saw? ARGS=\"--minutes 5\""
	@echo
	@echo "write"
	@echo "  make prove          everything CI runs, with the time of each stage"
	@echo "  make test-all       all tests of all chapters; make test-tools: only the tools' tests"
	@echo "  make check          fail if generated text is stale or a claim in a text is false; make sync regenerates it"
	@echo "  make propagate      merge a change into all later chapters: FROM=vNN, or ARGS=--continue, ARGS=--abort"
	@echo "  make new-vNN        start a chapter as a copy of the last one: NAME=..."
	@echo "  make notebooks      build the notebooks from their sources and run them; make nbdime: let git diff and merge them by cell"
	@echo "  make docs           build the site in build/site; make docs-serve shows it"
	@echo "  make film           record the terminal films: ARGS=race"
	@echo
	@echo "write, slow"
	@echo "  make traps-answers  what the model generates with each planted bug, where that is not recorded yet"
	@echo "  make traps-matrix   which tests of the suite catch each planted bug"
	@echo "  make mutants        change the code at random, and see whether a test notices: ARGS=\"v05 --new --record\""
	@echo
	@echo "chapters: $(CHAPTERS)"

setup: $(READY)
	$(SAY_AS_IT_IS)

.venv/.ready: constraints.txt pyproject.toml shared/commands/install.py
	@python3 shared/commands/install.py

# What notebooks and the site need in addition.
setup-book: $(BOOK)
	$(SAY_AS_IT_IS)

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

operate: $(READY)
	@$(PY) -m shared.verify.operate $(ARGS)

serve: $(READY)
	@$(PY) -m shared.commands.serve --model "$(MODEL)" $(ARGS)

chat: $(READY)
	@$(PY) -m shared.commands.chat $(ARGS)

# By default, the bundled model that was trained to call functions.
agent: $(READY)
	@$(PY) -m shared.commands.agent $(if $(filter-out file,$(origin MODEL)),--model "$(MODEL)") $(if $(value ASK),--ask="$$ASK_AS_TYPED") $(ARGS)

load: $(READY)
	@$(PY) -m shared.bench.load $(ARGS)

bench: $(READY)
	@$(PY) -m shared.bench suite --repeats 3 $(ARGS)

bench-all: $(READY)
	@$(PY) -m shared.bench suite --repeats 3 $(ARGS)
	@$(PY) -m shared.bench large --repeats 3 $(ARGS)

bench-peers: $(READY)
	@$(PY) -m shared.bench.engines $(ARGS)

bench-gpu: $(READY)
	@$(PY) -m shared.bench.gpu $(ARGS)

$(CHAPTERS:%=bench-%): bench-%: $(READY)
	@$(PY) -m shared.bench suite $* --before --repeats 3 $(ARGS)

bench-attention: $(READY)
	@$(PY) -m shared.bench.attention $(ARGS)

propagate: $(READY)
	@$(PY) -m shared.book.propagate $(FROM) $(ARGS)

new-%: $(READY)
	@$(PY) -m shared.book.new $* "$$NAME_AS_TYPED"

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
