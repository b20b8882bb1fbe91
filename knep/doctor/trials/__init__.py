"""Short trainings that tell what a look cannot: rates, remedies, and the verdict."""
