"""Pictures of what a training would see."""
