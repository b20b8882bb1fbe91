"""The clinic: sick and healthy training runs with known causes, and what doctors say of them."""
