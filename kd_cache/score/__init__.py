"""Inputs to rows, once: teachers, batches of fixed shape, freshness, commits."""
