"""Measurements: one script an area, results as CSV in results/ with machine, versions, commit and seed."""
