"""The commands of `vssl`, one file each; `vssl_dist.cli` parses their arguments."""
