# A clean clone needs Python 3.11 or newer and make; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, for example an index of CPU or CUDA builds; empty: wherever pip is configured to look.
TORCH_INDEX_URL ?=
# No CPU build of the oldest supported torch (2.11) is offered on the default index: OLDEST_TORCH=2.11.0 for that one.
OLDEST_TORCH ?= 2.13.0
# Where and how `make demo` runs; one process on the CPU is what every machine has.
LAUNCH ?= --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
RUN ?= runs/demo
# Extra arguments for the recipe (`make demo ARGS="--seed 1"`) or for pytest (`make test ARGS="-k balance"`).
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .build/oldest
BESIDE := .build/beside
# Two workers with a pool of torch threads each would fight for two cores.
PYTEST_FLAGS := -n 2 --durations=10
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS)

# $(1): the bin folder of an environment, $(2): its name in the report, $(3): a selection of tests.
define common_tests
mkdir -p .build
OMP_NUM_THREADS=1 $(1)/pytest $(PYTEST_FLAGS) -rs --junitxml=.build/transformers_suite_$(2).xml $(3) $(ARGS) \
	tests/transformers_suite/suite_*.py
$(1)/python tests/transformers_suite/compare_skips.py .build/transformers_suite_$(2).xml
endef

# Kernels on the CPU. Whether they are interpreted is decided for a whole process, hence a run of its own. $(1): which;
# a selection by ARGS may leave none (status 5).
define interpreted
TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and $(1)" $(ARGS) tests/triton_kernels tests/hf_models/moe || test $$? -eq 5
endef

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu test-transformers test-oldest compatibility faults lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and by itself: a resolver that sees everything at once may prefer another build of it.
# $(1): the environment, $(2): its torch, $(3): its constraints, $(4): its extras.
define install
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-sigma needs Python 3.11: make PYTHON=python3.11")'
$(PYTHON) -m venv $(1)
$(1)/bin/pip install -c $(3) setuptools
$(1)/bin/pip install -c $(3) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==$(2)
$(1)/bin/pip install -c $(3) --no-build-isolation -e '.[$(4)]'
touch $(1)/.installed
endef

PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(VENV),$(PINNED_TORCH),constraints.txt,test)

venv: $(INSTALLED)  ## .venv with the pinned set of constraints.txt

demo: $(INSTALLED)  ## train, save, reload and describe a small Sigma-MoE; the same command resumes
	$(BIN)/accelerate launch $(LAUNCH) -m trainers.recipes.pretrain_sigma_moe \
		--preset demo --output_dir $(RUN) $(ARGS)
	$(BIN)/python -m model_cards.build $(RUN)

test: $(INSTALLED)  ## everything quick, on the CPU
	$(PYTEST) -m "not slow and not gpu and not oldest and not interpreter" $(ARGS)
	$(call interpreted,not slow)

test-slow: $(INSTALLED)  ## the tests marked slow
	$(PYTEST) -m "slow and not gpu and not oldest and not interpreter" $(ARGS)
	$(call interpreted,slow)

test-gpu: $(INSTALLED)  ## the tests marked gpu, one process
	$(BIN)/pytest -m gpu --durations=10 $(ARGS)

DISTRIBUTED := is_tensor_parallel_test or is_expert_parallel_test or is_fsdp_test

# Of the oldest release the distributed tests only: sharding is what changed most since, and `test-oldest` does the rest.
# A family takes many minutes there: the sisters of Sigma-MoE, whose blocks are the same, run under the newest alone, and
# the encoders, image classifiers and models of devices, whose blocks are transformers' own, without the distributed ones.
test-transformers: $(INSTALLED) $(OLDEST)/.installed  ## transformers' own common tests on our models; skips compared with Qwen3-MoE's
	$(call common_tests,$(BIN),newest,-k "not ((Bert or DotCbm or ViT or DcCcl or PersonalLm or Llama) and ($(DISTRIBUTED)))")
	$(call common_tests,$(OLDEST)/bin,oldest,-m "$(DISTRIBUTED)" -k "SigmaMoeTest or Qwen3MoeTest")

# The lower bounds of pyproject.toml in place of the pins of constraints.txt. Only the pins of what we name ourselves stay:
# those of what they bring belong to the newest set (datasets 5.0 wants an older fsspec).
define LOWER_BOUNDS
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lowest = dict(re.match(r"([\w-]+)>=([\w.]+)", line).groups() for line in project["dependencies"])
lowest["torch"] = sys.argv[1]
named = open("constraints.txt").read().split("# what those bring")[0].splitlines()
pins = [line for line in named if line.split("==")[0] not in lowest]
print(*pins, *(f"{name}=={version}" for name, version in lowest.items()), sep="\n")
endef
export LOWER_BOUNDS

$(OLDEST)/.installed: pyproject.toml constraints.txt
	mkdir -p .build
	$(PYTHON) -c "$$LOWER_BOUNDS" $(OLDEST_TORCH) > .build/oldest.txt
	$(call install,$(OLDEST),$(OLDEST_TORCH),.build/oldest.txt,test)

# Then both ends of the range against each other: what one saves and publishes, the other loads without this package.
test-oldest: $(INSTALLED) $(OLDEST)/.installed  ## the model and Hub tests at the lower bounds of pyproject.toml
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest $(PYTEST_FLAGS) -m "not slow and not gpu and not oldest and not interpreter" $(ARGS) tests/hf_models
	OLDEST_PYTHON=$(abspath $(OLDEST)/bin/python) $(PYTEST) -m oldest $(ARGS) tests/hub

# Expert, tensor and FSDP2 parallelism is what of transformers' common tests belongs in the tables. Files by name: pytest
# leaves out what lies below another of its arguments.
SUITES := $(addprefix tests/transformers_suite/suite_,sigma_moe.py mone.py m_moe.py)

# What is in no other environment, beside the pinned set; it wants an older pillow.
BESIDE_EXTRAS := test,executorch,trackio

$(BESIDE)/.installed: pyproject.toml constraints.txt
	mkdir -p .build
	grep -v '^pillow==' constraints.txt > .build/beside.txt
	$(call install,$(BESIDE),$(PINNED_TORCH),.build/beside.txt,$(BESIDE_EXTRAS))

compatibility: $(BESIDE)/.installed  ## what works with which model, measured anew: the tables of the cards, and the page of all
	HF_SIGMA_COMPATIBILITY=model_cards OMP_NUM_THREADS=1 $(BESIDE)/bin/pytest $(PYTEST_FLAGS) -m "compatibility and not (gpu or oldest or interpreter)" $(ARGS) \
		$$(grep -rl mark.compatibility tests --include='test_*.py') $(SUITES)
	for table in model_cards/*/compatibility.json; do $(BESIDE)/bin/python -m model_cards.build $$(dirname $$table); done
	$(BESIDE)/bin/python -m model_cards.matrix

faults: $(INSTALLED)  ## the table of faults in the card of the reliability set, done anew
	HF_SIGMA_FAULTS=model_cards/reliability $(PYTEST) -m fault $(ARGS) tests/trainers
	$(BIN)/python -m model_cards.faults

lint: $(INSTALLED)  ## ruff, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## ruff, fixing what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## what the Makefile built, except .venv and runs/
	rm -rf .build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
