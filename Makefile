# make pretrain   everything from nothing: environment, demo corpus, vocabulary, a trained model
# make test       the tests;  make check: style, types, layers;  make bench, make bench-gpu: speed
# make test-faults  what breaks, for real and at length: README.md, 'Promises'; under 45 minutes
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete
# Data are prepared with what is there; only `setup` and what needs all packages build .venv.
DATA_PYTHON ?= $(if $(wildcard $(SETUP)),$(BIN)/python,$(PYTHON))

.PHONY: pretrain setup check format test test-faults bench bench-gpu
.DELETE_ON_ERROR:

pretrain: $(SETUP)
	./rtd.sh deberta-v3-nano
	@echo "How to train on your own text: README.md, 'Your own text'."

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo corpus: the Wikipedia sample of the gensim package, with a vocabulary of its own.
data/demo/manifest.json:
	$(DATA_PYTHON) data_tools/download.py demo -o data/raw/demo
	$(DATA_PYTHON) data_tools/train_tokenizer.py -i data/raw/demo -o data/raw/demo.spm.model --vocab_size 2048
	$(DATA_PYTHON) data_tools/prepare_data.py -i data/raw/demo -o data/demo --vocab data/raw/demo.spm.model \
		--max_seq_length 32 --valid_fraction 0.08

# WikiText-103 with the public DeBERTa-v3 vocabulary, from the Hugging Face hub.
data/wikitext-103/manifest.json:
	$(DATA_PYTHON) data_tools/download.py wikitext-103 -o data/raw/wikitext-103
	$(DATA_PYTHON) data_tools/download.py spm -o data/raw
	$(DATA_PYTHON) data_tools/prepare_data.py -i data/raw/wikitext-103/wiki.train.raw \
		--valid_input data/raw/wikitext-103/wiki.valid.raw -o data/wikitext-103 \
		--vocab data/raw/deberta_v3.spm.model --max_seq_length 512

check: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(SETUP)
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-faults: $(SETUP)
	$(BIN)/python -m pytest -raP tests/faults tests/test_resume.py

bench: $(SETUP)
	$(BIN)/python benchmarks/step.py

# On one CUDA device, with whatever python has torch, deepspeed and pytest there: first what must be
# right, then what is fast. Over in 8 minutes: a part that would last longer is ended, which is an
# error; attention's table gets what tests and steps left, and says which of its problems it left
# out. All: benchmarks/attention.py alone.
STEP_GPU := benchmarks/step.py --preset deberta-v3-base --rows 32 --length 512
bench-gpu: export PYTHONPATH := .
bench-gpu: END := $(shell expr $$(date +%s) + 440)
bench-gpu: IN_TIME = timeout --foreground --verbose $$(($(END) + 30 - $$(date +%s))) $(PYTHON)
bench-gpu:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("bench-gpu needs a CUDA device; \
	torch " + torch.__version__ + " sees none. Name a python whose torch does: make bench-gpu PYTHON=...")'
	$(IN_TIME) -m pytest -q -m gpu tests/kernels tests/objectives
	$(IN_TIME) $(STEP_GPU) > benchmarks/results/step_gpu.md
	$(IN_TIME) $(STEP_GPU) --attention triton --compile >> benchmarks/results/step_gpu.md
	$(IN_TIME) $(STEP_GPU) --attention triton --deepspeed_config zero0_bf16 >> benchmarks/results/step_gpu.md
	$(IN_TIME) benchmarks/attention.py --minutes $$((($(END) - $$(date +%s)) / 60)) \
		> benchmarks/results/attention_gpu.md
	cat benchmarks/results/*_gpu.md
