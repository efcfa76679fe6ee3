"""Slow float64 references, written from the paper's formulas: they import nothing from the library."""
