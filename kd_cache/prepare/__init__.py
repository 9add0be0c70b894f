"""Audio and metadata to a manifest and features, before anything is cached."""
