"""The model's modules, each of one device and free of ranks, precision and checkpoint names."""
