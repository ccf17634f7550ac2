"""The sections of `bench.gpu_first`, each of which runs in a process of its own."""
