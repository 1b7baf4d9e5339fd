# Each target only calls commands that the README shows.
PYTHON ?= python3

.PHONY: demo test test-slow lint venv

demo: venv
	.venv/bin/python data/fables/prepare.py
	.venv/bin/python train.py config/train_fables.py
	.venv/bin/python eval.py --out_dir=out-fables
	.venv/bin/python sample.py --out_dir=out-fables

test: .venv/test-requirements
	.venv/bin/python -m pytest

lint: .venv/test-requirements
	.venv/bin/python -m ruff check .

# Also what needs llama.cpp, which pip compiles in ten minutes on two cores.
test-slow: .venv/test-requirements
	.venv/bin/python -m pip install --quiet --requirement requirements-slow.txt
	.venv/bin/python -m pytest -m slow

venv: .venv/requirements

.venv/requirements: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test-requirements: requirements-dev.txt .venv/requirements
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
