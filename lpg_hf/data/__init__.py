"""
Label noise, long tails, class counts and corrected labels for `datasets.Dataset`.

Only the label column is ever read or written. Image columns are neither decoded nor encoded again (instance-dependent
noise looks at them, and leaves them as they are). A `set_transform` never runs and comes back unchanged.
"""

from .fixes import apply_fixes
from .issues_csv import write_issues
from .labels import CLEAN_LABEL_COLUMN, LABEL_COLUMNS, class_counts, find_label_column
from .long_tail import make_long_tailed
from .noise import NOISE_KINDS, add_label_noise


__all__ = [
    "CLEAN_LABEL_COLUMN",
    "LABEL_COLUMNS",
    "NOISE_KINDS",
    "add_label_noise",
    "apply_fixes",
    "class_counts",
    "find_label_column",
    "make_long_tailed",
    "write_issues",
]
