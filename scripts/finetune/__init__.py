"""What each strategy of fine-tuning is worth on few images: from one half of the classes to the other."""
