"""Cell types from the cells' own transcripts."""
