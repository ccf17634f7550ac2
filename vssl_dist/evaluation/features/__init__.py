"""Features of images from frozen networks: extracted, kept on disk, shared out to workers."""
