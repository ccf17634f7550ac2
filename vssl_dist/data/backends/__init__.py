"""Backends that make views of encoded images and drawn parameters: DALI, PIL with torchvision."""
