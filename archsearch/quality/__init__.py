"""Quality of candidates after short training runs: losses, distances, retrieval, CLIP score."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.quality.candidate_evaluator import CandidateEvaluator
    from archsearch.quality.evaluator import Evaluator
    from archsearch.quality.feature_extractors import FeatureExtractor, load_extractor
    from archsearch.quality.supernet import Supernet
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["CandidateEvaluator", "Evaluator", "FeatureExtractor", "Supernet", "load_extractor"]
