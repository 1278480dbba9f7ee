"""Distributions of counts, and what is fitted to the cells of each type."""
