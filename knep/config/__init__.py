"""From override lines to a checked config, and from a checked config to objects on the allow-list."""
