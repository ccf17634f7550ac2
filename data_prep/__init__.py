"""From image files to shards: the programs that a dataset passes through once."""
