"""Training objectives: flow matching, knowledge, adversarial and progressive distillation."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.objectives.build import build_objectives
    from snapgen.objectives.teacher import Teacher, TeacherConfig, load_teacher
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Teacher", "TeacherConfig", "build_objectives", "load_teacher"]
