"""One run in its folder: resumed, reported, swept, replayed."""
