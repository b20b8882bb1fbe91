"""One module per slot, one public name per trick; a trick knows nothing of configs, trainers or knep's models."""
