"""Datasets on disk: their manifest, their shards, and reading from storage that may not answer."""
