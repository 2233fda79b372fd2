# check: the linters of .ci/run. test: the README's test command. fix: what the linters can mend. pictures: docs/*.svg.
.PHONY: check test fix pictures

check: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy *.py
	.venv/bin/mypy tests

test:
	python3 -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt && .venv/bin/python -m pytest -n 2

fix: .venv
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

pictures: .venv
	.venv/bin/python docs/make_pictures.py

.venv: requirements.txt requirements-dev.txt
	python3 -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt
	touch .venv
