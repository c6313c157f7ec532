"""Stick-breaking attention (arXiv 2410.17980), current token included, remainder dropped."""

from pallas_kernels.stick_breaking.api import resolve, stick_breaking_attention
from pallas_kernels.stick_breaking.residuals import SAVED

__all__ = ["SAVED", "resolve", "stick_breaking_attention"]
