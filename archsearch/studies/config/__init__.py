"""YAML schemas, and how the shipped files are found."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.config.ablation import AblationConfig
    from archsearch.studies.config.evolution import EvolutionConfig
    from archsearch.studies.config.study import LatencyConfig, SamplerConfig, StudyConfig, load_config
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["AblationConfig", "EvolutionConfig", "LatencyConfig", "SamplerConfig", "StudyConfig", "load_config"]
