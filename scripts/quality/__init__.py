"""How well knep learns real data, beside what people would use: regression, classes, text, scenes, labels."""
