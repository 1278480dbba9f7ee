"""Readers of counts, bulk tables and labels from files of any origin; they import runtime alone."""
