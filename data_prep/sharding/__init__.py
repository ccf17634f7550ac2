"""A dataset made from images: survey, decisions, shards, manifest."""
