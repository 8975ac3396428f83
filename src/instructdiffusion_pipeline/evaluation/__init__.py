"""What a model is worth: its answers read, scored, and laid beside what its autoencoder alone would allow.

Needs the extra `eval` (pycocotools, scikit-image). `cases` says what is asked, `runner` asks it, `metrics` has the
scores, `scoring` applies them to readings, and `report` writes the table.
"""

from .cases import Case, Exam, ScoredCrop, cases_from, whole_person
from .runner import evaluate

__all__ = ["Case", "Exam", "ScoredCrop", "cases_from", "evaluate", "whole_person"]
