# Two commands for a machine that has nothing but Python: `make train` and `make test`.
# Both make their own environment in .venv the first time; see .ci/environment.sh for what can be chosen
# (PYTHON, TORCH_VERSION, TORCH_INDEX_URL).

ARGS ?=
export PYTHON TORCH_VERSION TORCH_INDEX_URL

.PHONY: help train test clean

help:
	@echo "make train   install what is needed and train the small model on real text"
	@echo "             (make train ARGS='trainer.max_steps=20 model=tiny' changes anything)"
	@echo "make test    install what is needed, then check style and types and run the tests"
	@echo "             (make test ARGS='-k router' passes arguments to pytest)"
	@echo "make clean   remove the environment and the caches, keep the runs"

train:
	@sh .ci/environment.sh plots
	.venv/bin/lightning run model examples/train.py $(ARGS)

test:
	@sh .ci/test.sh $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
