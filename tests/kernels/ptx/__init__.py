"""An interpreter of the PTX that nvcc writes for the kernels of `csrc/`: numpy, all threads of a grid at once.

`program` reads the text, `machine` runs it, `memory` holds the state spaces and `order` knows which accesses are
ordered. `arithmetic`, `transfers` and `matrices` are the instructions of sm_80, `barriers` and `products` those that
sm_90a adds. Nothing there knows our kernels: `launches` does, which has our own launchers say what they would start.
"""

from ptx import arithmetic, barriers, matrices, products, transfers

__all__ = ["arithmetic", "barriers", "matrices", "products", "transfers"]
