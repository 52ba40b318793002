"""``Calibrator``: chooses households and fits their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from l0hooks.calibration.data.households import GivenHouseholds, check_count
from l0hooks.calibration.data.inputs import Inputs, read_inputs
from l0hooks.calibration.data.matrix import read_matrix
from l0hooks.calibration.data.targets import GivenTargets
from l0hooks.calibration.data.units import warn_of_units
from l0hooks.calibration.fit.checkpoint import Checkpoint
from l0hooks.calibration.fit.driver import Driver, Outcome, conflicting, prepared
from l0hooks.calibration.fit.progress import Display
from l0hooks.calibration.numerics.columns import Floats
from l0hooks.calibration.output.misses import warn_of_misses
from l0hooks.calibration.output.result import CalibrationResult
from l0hooks.calibration.settings import Settings
from l0hooks.errors import InvalidValueError, StateError, explain


class Calibrator(Settings):
    r"""Chooses households and finds weights \(w \ge 0\) with \(Mw \approx y\).

    Parameters
    ----------
    k : int, optional
        How many households have a positive weight. Without ``k`` and ``l0`` all.
    l0 : float, > 0, optional
        Instead of ``k``: the price of one household in the loss. Households are added and dropped while the loss plus
        the price of all falls; the search begins with gates and, with up to 200 targets, greedy search.
    bounds : (lo, hi)
        Of a chosen household's weight: numbers, or one for each by name. ``hi`` may be infinite.
    bounds_on : "ratio" or "weight"
        Weight / design weight, or the weight.
    distance : "chi_square" or "raking"
        From the design weights.
    rescale_design : bool
        Nearest to the design weights times the one number with which the targets are met in the median.
    cluster_distance : "once" or "members"
        Whether a cluster counts in the distance once, or once for each member, as R's ``aggregate.stage``.
    loss : "relative" or "squared"
        Errors are divided by \|y\| + ``error_offset`` of each target, or by one number for all.
    error_offset : float, > 0
        Relative errors are (estimate − y) / (\|y\| + ``error_offset``). 1 suits counts and sums; for targets far below
        1, such as shares, give the size of an error that would still matter.
    method : "auto", "gates", "greedy" or "dense"
        How households are chosen: "auto" keeps the best of all that could be best.
    objective : "auto", "least_squares" or "distance"
        Of the last fit: the smallest error, or the smallest distance that meets the targets.
    groups : array_like, Series or mapping, optional
        A label for each target. Errors are averaged within a group: each counts the same.
    group_multipliers : mapping from label to float >= 0, optional
    normalize_groups : bool
        False: targets count by themselves.
    hierarchy : mapping, optional
        Parent → [children] or child → parent, by target: the estimates of children should add up to their parent's.
    consistency : float, >= 0
        What a squared error of such a sum counts, against 1 for a target.
    importance : array_like, Series or mapping, >= 0, optional
        What each target's squared error counts; 1 if not named.
    tolerance : float, > 0
        The relative error up to which a target is met.
    max_epochs : int, > 0
    patience : int, > 0, optional
        Early stopping: gates (once their number is the final one) and swaps end after this many steps in which the
        error did not fall by 1 %. Without it gates take all their epochs, and swaps go on while they gain.
    device : "cpu" or torch.device
        Where the fit runs.
    dtype : "float32" or "float64"
        Of the matrix during the search; the last fit is in float64.
    random_state : int, >= 0
    checkpoint : path-like, optional
        A file for the state of a long fit. If it exists, the fit goes on from it, to the same result.
    checkpoint_interval : float, >= 0
        Seconds between two writings.
    keep_checkpoint : bool
        Leave it at the end, until you have written the results; else it is deleted.
    callbacks : iterable of callables
        Called with an :class:`~l0hooks.calibration.fit.progress.Update` after each step; True ends the search.
    progress : bool, optional
        If not given: a line in a terminal, else ``logging`` (``l0hooks.calibration``, INFO).

    Attributes
    ----------
    result_ : CalibrationResult
        Of the last fit.

    Raises
    ------
    InvalidValueError
        If an option is outside its range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> M = rng.random((4, 60))
    >>> calibrator = Calibrator(10, max_epochs=40)
    >>> result = calibrator.fit(M, M.sum(axis=1))
    >>> result.active, bool(result.error < 1e-6)
    (10, True)
    >>> calibrator.predict(M[:1]).round(3) == M[:1].sum(axis=1).round(3)
    array([ True])

    References
    ----------
    Deville & Särndal (1992), Calibration estimators in survey sampling. Louizos, Welling & Kingma (2018), Learning
    sparse neural networks through L0 regularization, equations 10 to 12, for the gates.
    """

    def fit(
        self,
        M: object,  # noqa: N803
        y: object = None,
        *,
        lower: object = None,
        upper: object = None,
        design_weights: object = None,
        keep: object = None,
        leave_out: object = None,
        clusters: object = None,
    ) -> CalibrationResult:
        """Choose households and fit their weights.

        Parameters
        ----------
        M : scipy.sparse array or matrix of any format, array_like, tensor, data frame or NamedMatrix; shape (T, N)
            What one household adds to each target. A frame, of pandas, polars, pyarrow or others, names its rows in a
            column ``target``, or ``household`` if it has one row for each household.
        y : array_like, Series, mapping or data frame; shape (T,)
            Targets, by name where they have names. A frame has a column ``value``, or ``lower`` and ``upper``, and
            perhaps ``target``, ``group`` and ``importance``.
        lower, upper : as ``y``, optional
            Intervals instead of points; an end that is not given is infinite.
        design_weights : array_like, Series, mapping or data frame, >= 0, shape (N,), optional
            One each if not given. A household with zero, as in replicate weights, stays at zero.
        keep, leave_out : names, numbers or flags of households, optional
            Households that must, and that must not, be chosen.
        clusters : array_like, Series or mapping, optional
            Labels: households of one label share one weight, and count as one in ``k``. Bounds on ratios hold for that
            weight over their mean design weight.

        Returns
        -------
        CalibrationResult

        Raises
        ------
        InvalidValueError
            If the data are not right; before any work.
        StateError
            If the checkpoint is of other data or settings.

        Warns
        -----
        CalibrationWarning
            Of targets out of reach or in another unit than their rows, of parents that are not the sum of their
            children, of targets missed unless a price was asked for, and if the fit did not converge.
        """
        inputs = self._read(
            M,
            self._targets(y, lower, upper),
            GivenHouseholds(design_weights, self.bounds, self.bounds_on, keep, leave_out, clusters),
            self.k,
        )
        (outcome,) = self._run(inputs, [None if self.k is None else int(self.k)])
        self.result_ = self._result(inputs, outcome)
        return self.result_

    def fit_path(
        self,
        M: object,  # noqa: N803
        y: object = None,
        *,
        ks: Iterable[int],
        lower: object = None,
        upper: object = None,
        design_weights: object = None,
        keep: object = None,
        leave_out: object = None,
        clusters: object = None,
    ) -> dict[int, CalibrationResult]:
        """Fit for several numbers of households, the largest first; each fit may start from the one before.

        Parameters
        ----------
        ks : iterable of int
            Instead of ``k``.
        M, y, lower, upper, design_weights, keep, leave_out, clusters
            As for :meth:`fit`.

        Returns
        -------
        dict from int to CalibrationResult
            In ascending order. ``result_`` is that of the largest.
        """
        asked = list(ks)
        if not asked or self.l0 is not None:
            raise InvalidValueError(
                explain("fit_path", "it needs numbers of households.", got=f"{asked}, l0={self.l0}")
            )
        inputs = self._read(
            M,
            self._targets(y, lower, upper),
            GivenHouseholds(design_weights, self.bounds, self.bounds_on, keep, leave_out, clusters),
            asked[0],
        )
        sizes = sorted({check_count(k, inputs.people) for k in asked}, reverse=True)
        results = {one.keep: self._result(inputs, one) for one in self._run(inputs, sizes)}
        self.result_ = results[sizes[0]]
        return {k: results[k] for k in reversed(sizes)}

    def predict(self, M: object) -> Floats:  # noqa: N803
        """M w with the weights of the last fit.

        Parameters
        ----------
        M : as for :meth:`fit`; shape (any, N)
            Households are aligned by name where both matrices have names.

        Returns
        -------
        float64 array, shape (any,)

        Raises
        ------
        StateError
            If nothing was fitted.
        InvalidValueError
            If the households are not those of the fit.
        """
        fitted: CalibrationResult | None = vars(self).get("result_")
        if fitted is None:
            raise StateError(explain("Calibrator.predict", "fit() must come first."))
        matrix, _, households = read_matrix(M)
        known = fitted.inputs.households
        if households.count != known.count:
            raise InvalidValueError(
                explain("predict", "M must have the fitted households.", expected=known.count, got=households.count)
            )
        weights = fitted.weights
        if households.names is not None and known.names is not None:
            weights = households.values(
                dict(zip(known.names, weights.tolist(), strict=True)), "predict (fitted households)"
            )
        return np.asarray(matrix.astype(np.float64, copy=False) @ weights, np.float64)

    def _targets(self, y: object, lower: object, upper: object) -> GivenTargets:
        return GivenTargets(
            y,
            lower,
            upper,
            groups=self.groups,
            importance=self.importance,
            group_multipliers=self.group_multipliers,
            normalize_groups=self.normalize_groups,
            hierarchy=self.hierarchy,
        )

    def _read(self, matrix: object, targets: GivenTargets, households: GivenHouseholds, k: int | None) -> Inputs:
        selects = k is not None or self.l0 is not None
        inputs = read_inputs(matrix, targets, households, k=k, selects=selects, dtype=self.dtype)
        warn_of_units(inputs)
        return inputs

    def _run(self, inputs: Inputs, sizes: Sequence[int | None]) -> list[Outcome]:
        options = self.solver_options()
        checkpoint = None
        if self.checkpoint is not None:
            settings = f"{inputs.fingerprint()} {options} {self.problem_options()} {list(sizes)}"
            checkpoint = Checkpoint(self.checkpoint, settings, interval=self.checkpoint_interval)
            checkpoint.read()  # one of other data is refused before any work
        driver = Driver(
            prepared(inputs, **self.problem_options()),
            options,
            sizes,
            callbacks=self.callbacks,
            display=Display(self.progress),
            checkpoint=checkpoint,
            keep_checkpoint=self.keep_checkpoint,
        )
        return driver.run()

    def _result(self, inputs: Inputs, outcome: Outcome) -> CalibrationResult:
        result = CalibrationResult(
            weights=outcome.weights,
            inputs=inputs,
            stage=outcome.stage,
            converged=outcome.optimal and (outcome.verdict == "met" or self.l0 is not None),
            reason=outcome.reason,
            rows=outcome.rows,
            candidates=outcome.candidates,
            offset=self.error_offset,
            verdict=outcome.verdict,
            conflict=conflicting(inputs, outcome),
        )
        warn_of_misses(result, self.tolerance, priced=self.l0 is not None)
        return result
