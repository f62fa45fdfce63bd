"""Figures of runs, drawn from their signals."""
