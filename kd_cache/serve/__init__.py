"""Rows to students: an opened cache, and loaders that hand its rows out with the samples."""
