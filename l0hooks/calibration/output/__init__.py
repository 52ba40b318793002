"""What a calibration returns: the result, its tables, plots and HTML report."""
