"""Biological samples of a reference: their moments, bulks of them, and how states show there."""
