"""One image file: whether it can be used, and bytes that every decoder reads alike."""
