"""Estimates with intervals, rank correlation, regression, Pareto."""
