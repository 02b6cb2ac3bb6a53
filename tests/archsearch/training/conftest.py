from tests.archsearch.studies.conftest import _in_an_empty_folder, start

__all__ = ["_in_an_empty_folder", "start"]
