"""What is typed: other words for options, keys that nobody reads, and the line to write instead."""
