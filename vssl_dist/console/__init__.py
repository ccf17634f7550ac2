"""What a command says: how it ends, progress bars, tables."""
