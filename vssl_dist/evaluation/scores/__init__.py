"""What is computed from features: pure functions of tensors."""
