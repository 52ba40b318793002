"""Residual width: the channels of a stream that norms read, found, gated where they are written, and cut exactly."""
