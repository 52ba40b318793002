"""Gates and their noise in compiled code: Numba on the CPU, Triton on CUDA."""
