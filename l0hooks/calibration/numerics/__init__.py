"""The mathematics of a calibration: the prepared problem, least squares, nearest weights and proofs."""
