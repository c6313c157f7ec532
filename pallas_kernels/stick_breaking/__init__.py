"""Stick-breaking attention (arXiv 2410.17980), current token included, remainder dropped."""

from pallas_kernels.stick_breaking.api import resolve, stick_breaking_attention

__all__ = ["resolve", "stick_breaking_attention"]
