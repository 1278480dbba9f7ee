"""How good generated cells, proportions and states are."""
