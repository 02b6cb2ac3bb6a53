"""Optuna storage, trial leases, the trial queue."""
