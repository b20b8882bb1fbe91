"""Data of one's own beside folders of classes: tables, texts, listed pictures, masks, and loaders from a project."""
