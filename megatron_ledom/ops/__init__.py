"""The Python face of `csrc/`: masks, the float64 reference, the fused operations and the choice of their path."""
