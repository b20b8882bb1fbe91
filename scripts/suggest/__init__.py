"""How good `knep suggest` and `recipe=auto` are."""
