"""Kernels of the LMU in C++ (compiled) and Triton (triton_kernels), and the same in plain torch (implicit_attention)."""
