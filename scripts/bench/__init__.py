"""The rooms of the bench: cases, contenders, measuring, bars, the page in docs."""
