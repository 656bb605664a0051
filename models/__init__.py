"""Models in Flax NNX: architecture, layers, and the names that checkpoints use."""
