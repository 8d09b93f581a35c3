"""Pure functions on tensors. Each has a plain-torch form that is the truth."""
