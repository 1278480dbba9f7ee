"""What is computed from counts: variable genes, markers, sums of cells."""
