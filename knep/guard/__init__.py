"""When numbers go wrong: what is caught (`policy`), how (`sentry`, `finite`, `spike`), and what is left (`box`)."""
