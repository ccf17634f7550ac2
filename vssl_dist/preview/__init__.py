"""Sheets of the images that a training would see."""
