"""Training objectives: flow matching, knowledge, adversarial and progressive distillation."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.objectives.build import build_objectives as build_objectives
    from snapgen.objectives.teacher import (
        Teacher as Teacher,
        TeacherConfig as TeacherConfig,
        load_teacher as load_teacher,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
