"""Compiled kernels: C++ for CPUs (compiled), Triton for GPUs (triton_kernels), and the functions that choose and call them."""
