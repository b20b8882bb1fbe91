"""What people run by hand and nobody imports: the bench and the clinic."""
