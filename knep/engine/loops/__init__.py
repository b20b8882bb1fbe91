"""How batches follow each other: Lightning's loops made exact, a lean one, and how one is interrupted."""
