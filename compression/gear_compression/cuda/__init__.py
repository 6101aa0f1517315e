"""The CUDA backend: C++ kernels compiled at run time for one page layout, and PyTorch operators around them.

Nothing here is imported unless a CUDA device is asked for; NVIDIA's `cuda-core` and NVRTC come with `gearserve[cuda]`.
"""
