"""Imported once by the process that the tests fork theirs from: everything heavy, and a first use of the storage."""

import optuna

import archsearch.score
import archsearch.spaces.loading
import archsearch.studies.search.run
import tests.archsearch.studies.quick

optuna.logging.set_verbosity(optuna.logging.WARNING)
optuna.create_study(storage=optuna.storages.RDBStorage("sqlite:///:memory:"), sampler=optuna.samplers.TPESampler())

__all__ = ["archsearch", "tests"]
