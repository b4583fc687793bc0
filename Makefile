.PHONY: quality style test test-slow

quality:
	ruff check .
	ruff format --check .
	mypy

style:
	ruff check --fix .
	ruff format .

test:
	python -m pytest

test-slow:
	python -m pytest -m slow
