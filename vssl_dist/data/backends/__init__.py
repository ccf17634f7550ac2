"""What turns encoded images and drawn parameters into views: DALI, or PIL and torchvision."""
