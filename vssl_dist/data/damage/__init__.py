"""Damaged images: what is shown instead, and where each one is written down."""
