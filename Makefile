# Each target only calls commands that the README shows.
PYTHON ?= python3

.PHONY: demo test venv

demo: venv
	.venv/bin/python data/fables/prepare.py
	.venv/bin/python train.py config/train_fables.py
	.venv/bin/python eval.py --out_dir=out-fables
	.venv/bin/python sample.py --out_dir=out-fables

test: .venv/test-requirements
	.venv/bin/python -m pytest

venv: .venv/requirements

.venv/requirements: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test-requirements: requirements-dev.txt .venv/requirements
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
