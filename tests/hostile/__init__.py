"""Files from strangers over every door of knep: `python -m tests.hostile` prints what each of them got."""
