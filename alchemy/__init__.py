"""The embedded default: a small closed world that trains on two CPU cores with no download."""
