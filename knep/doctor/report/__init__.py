"""The examination as an HTML page with its figures."""
