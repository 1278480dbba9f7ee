"""From bulks to proportions and expression of cell types."""
