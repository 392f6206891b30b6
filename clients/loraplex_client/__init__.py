"""A Python client for a Loraplex server."""
