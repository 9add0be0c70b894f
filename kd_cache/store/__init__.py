"""Rows on disk: packs are the truth, an index names what is current, a view repeats it for others."""
