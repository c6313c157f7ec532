"""Measurements behind `mfjax bench`."""
