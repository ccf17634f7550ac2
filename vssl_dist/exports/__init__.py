"""Exports, the one bridge from trainings to evaluations: their card, writing, reading them."""
