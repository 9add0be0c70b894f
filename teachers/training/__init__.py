"""The older place of what is now `teachers` and `kd_cache.train`; kept for imports that were documented."""
