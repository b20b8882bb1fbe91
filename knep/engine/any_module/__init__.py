"""A recipe on anybody's LightningModule: the callback that acts in its fit, and what it says that it did."""
