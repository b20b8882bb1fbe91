"""The rooms of `scripts/bench.py`: cases, contenders, measuring, bars, the page in docs."""
