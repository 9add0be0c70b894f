"""Keeping a cache healthy: verify, repair, seal, merge, gc, diff."""
