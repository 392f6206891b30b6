"""The server: HTTP, engine, model and kernels."""
