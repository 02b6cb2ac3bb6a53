"""Quality of candidates after short training runs: losses, distances, retrieval, CLIP score."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.quality.candidate_evaluator import CandidateEvaluator as CandidateEvaluator
    from archsearch.quality.evaluator import Evaluator as Evaluator
    from archsearch.quality.feature_extractors import (
        FeatureExtractor as FeatureExtractor,
        load_extractor as load_extractor,
    )
    from archsearch.quality.supernet import Supernet as Supernet
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
