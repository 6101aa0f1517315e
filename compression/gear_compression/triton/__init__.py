"""Kernels for which Triton is as fast as CUDA C++. With TRITON_INTERPRET=1 they run on a CPU."""
