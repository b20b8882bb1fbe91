"""How often the rate that `knep lr` finds is that of a grid."""
