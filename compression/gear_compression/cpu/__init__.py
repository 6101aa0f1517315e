"""The CPU backend: Numba kernels that read codes straight into the dot product, as the GPU kernels do."""
