"""The matrix as it was given, from which the last fit reads the rows of the chosen units without rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l0hooks.calibration.numerics.columns import Floats, Integers, Sparse, scale_rows, stored_by_unit


@dataclass(frozen=True, eq=False)
class GivenMatrix:
    """M, and how units, row scale and design weights make B of it.

    Attributes
    ----------
    rows : sparse.csr_array, shape (Q, n_households)
        M, with a row for each condition of consistency.
    scale : float64, shape (Q,)
    members : int64, shape (n_households,)
        Unit of each household, −1 for one left out.
    design : float64, shape (n,)
    """

    rows: Sparse
    scale: Floats
    members: Integers
    design: Floats

    def block(self, units: Integers) -> Sparse:
        """Bᵢ of some units in float64, from the numbers as they were given.

        Examples
        --------
        >>> from scipy import sparse
        >>> matrix = sparse.csr_array([[1.0, 2.0, 3.0]])
        >>> given = GivenMatrix(matrix, np.ones(1), np.arange(3), np.array([1.0, 1.0, 5.0]))
        >>> given.block(np.array([2, 0])).toarray()
        array([[15.],
               [ 1.]])
        """
        ascending = np.sort(units)
        place = np.full(len(self.design) + 1, -1, np.int64)  # the last entry is for households left out
        place[ascending] = np.arange(len(units))
        number = place[self.members]
        inside = np.flatnonzero(number >= 0)
        rows = self.rows if len(inside) == len(self.members) else self.rows[:, inside]
        block = stored_by_unit(rows, self.scale, number[inside], len(units), np.dtype(np.float64))
        scale_rows(block, self.design[ascending])
        return block if np.array_equal(ascending, units) else block[np.searchsorted(ascending, units)]
