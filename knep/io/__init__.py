"""Files that are whole or absent, and files from strangers."""
