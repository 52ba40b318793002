"""What a user passes to a calibration: read from files, aligned by name and checked."""
