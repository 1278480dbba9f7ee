"""What is computed from matrices of counts: variable genes, sums of cells."""
