"""Ablation, proxy audit, validation of a latency model."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.experiments.ablation import ablate as ablate
    from archsearch.studies.experiments.ablation_results import Ablation as Ablation, load_results as load_results
    from archsearch.studies.experiments.latency_validation import validate_model as validate_model
    from archsearch.studies.experiments.proxy_audit import audit as audit
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
