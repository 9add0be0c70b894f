"""Measurements against real alternatives. ``make bench`` runs them; ``docs/performance.md`` tells the results."""
