"""Whole files to and from object stores: one small interface for all. Nothing here knows a cache."""
