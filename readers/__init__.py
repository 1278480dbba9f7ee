"""What comes in: counts, bulk tables, labels, from files of any origin. Imports runtime alone."""
