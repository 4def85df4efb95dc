"""The tests are a package so that they can share modules by absolute import: ``from tests.checkpoints import ...``."""
