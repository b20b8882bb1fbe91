"""What a training writes while it runs: curves, tables, the bar."""
