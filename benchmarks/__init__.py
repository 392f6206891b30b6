"""Micro-benchmarks of kernels and of the HTTP path; notes, and committed results, with machine, versions and commit.

``loraplex bench`` measures the engine and the server; its parts are in ``loraplex_server.bench``.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
