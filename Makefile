.PHONY: help install lint test slow golden pairs bench

help: ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: ## the package with its development tools
	pip install -e ".[dev]"

lint: ## ruff and pyright
	ruff check . && ruff format --check . && pyright

test: ## the test suite on two processes
	pytest -n 2

slow: ## the cells of long tables that `make test` leaves out (minutes)
	pytest -n 2 -m slow

golden: ## write the golden losses anew (look at the difference before you commit it)
	python -m tests.exhaustive.golden --write

pairs: ## every pair of options: trained or refused (about 20 minutes on two cores)
	python -m tests.exhaustive.pairs

bench: ## knep beside a hand-written loop and the usual Lightning set-up (about half an hour)
	python -m scripts.bench steps
