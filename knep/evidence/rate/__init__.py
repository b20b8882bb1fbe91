"""A learning rate that was tried: a range test over seeds, then short paired trials against the default."""
