"""Data modules: images as uint8, whole batches, on the device."""
