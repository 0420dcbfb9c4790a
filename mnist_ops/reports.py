"""Numbers printed in the reports, to stand beside a run's own."""

from __future__ import annotations

__all__ = ["TABLE_3_1"]

#: Report 1, Table 3.1, "The training and test accuracy of the original model": for each epoch
#: training and test accuracy in %, as printed.
TABLE_3_1: dict[int, tuple[float, float]] = {
    1: (96.71, 99.04),
    2: (99.04, 99.41),
    3: (99.34, 99.40),
    4: (99.53, 99.47),
    5: (99.62, 99.48),
    6: (99.77, 99.54),
    7: (99.81, 99.48),
    8: (99.86, 99.43),
    9: (99.89, 99.49),
    10: (99.92, 99.51),
}
