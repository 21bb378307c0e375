"""The verification of the CUDA kernels on a GPU, behind `tools/verify_kernels.py`."""
