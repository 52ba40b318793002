"""Best subsets of columns for linear models, on NumPy and SciPy alone."""
