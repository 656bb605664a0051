"""Attention and cache kernels, each beside a float32 reference in plain jax."""
